"""MiniCPM-Llama3-V 2.5 and MiniCPM-V 2.0: vision tower `vpm`, `resampler` and language model `llm`.

Shapes: B samples, L tokens of the longest sample, T tokens of all samples together, S slices in the whole batch,
Q query tokens per slice, D width of the language model. Labels are shifted by the dataset, never here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, RepetitionPenaltyLogitsProcessor
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_minicpm import MiniCPMVConfig
from .conversation import encode
from .image_slicing import normalise, upright_rgb
from .language import LMHead, language_model, rotary_tables
from .packing import Packing
from .resampler import Resampler
from .streaming import AnswerStream, answer_text, stop_ids
from .vision import StripVisionTransformer, TimmVisionTower, patch_grid, to_patches

logger = logging.getLogger(__name__)

# The original chat's, with `sampling` and without.
SAMPLING = {"do_sample": True, "top_p": 0.8, "top_k": 100, "temperature": 0.7, "repetition_penalty": 1.05}
BEAM_SEARCH = {"do_sample": False, "num_beams": 3, "repetition_penalty": 1.2}
AUTO_MAP = {
    "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
    "AutoModel": "modeling_minicpmv.MiniCPMV",
    "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
}


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """The model of either checkpoint, told apart by its config, under the checkpoint's weight names."""

    config_class = MiniCPMVConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _no_split_modules = ["LlamaDecoderLayer", "GraniteDecoderLayer", "Idefics2EncoderLayer", "Block", "Resampler"]

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        self.llm = language_model(config)
        if config.llm_type == "llama3":
            self.vpm = StripVisionTransformer(config.vision_tower_config())
        else:
            self.vpm = TimmVisionTower(config.vision_encoder, config.drop_vision_last_layer)
        self.scale_emb = config.scale_emb or 1.0
        self.logits_scaling = getattr(self.llm.config, "logits_scaling", 1.0)
        self.resampler = Resampler(
            config.query_num, config.hidden_size, self.vpm.width, query_positions=config.llm_type == "minicpm"
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Resampler):
            module.init_parameters()
        elif isinstance(module, TimmVisionTower):
            for parameter in (module.pos_embed, module.cls_token, module.reg_token):
                if parameter is not None:
                    init.normal_(parameter, std=0.02)
        else:
            super()._init_weights(module)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer recomputes its activations. PEFT (0.21) asks by this name, which warns in transformers from
        5.23 on, where it is `is_activation_checkpointing`. Remove once PEFT asks by that one."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> MiniCPMV:
        """As in transformers; `output`, which the original's FAQ passes here, means nothing to loading."""
        kwargs.pop("output", None)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As in transformers; the model code travels along, so the folder loads with `trust_remote_code=True`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    def get_vision_embedding(
        self,
        pixel_values: Sequence[torch.Tensor],
        tgt_sizes: torch.Tensor | None = None,
        groups: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Features of slices, all in one batch.

        Args:
            pixel_values: S slices, each (3, H, W) or a strip (3, P, N * P): normalised floats, or uint8.
            tgt_sizes: (S, 2) integers, patches (high, wide). Needed for strips, whose shape does not tell.
            groups: how many successive slices belong together. In 2.5 a slice's features depend on the longest
                slice of its group (see `StripVisionTransformer`); None: all slices are one group, as in the original.

        Returns:
            (S, Q, D)
        """
        device, dtype = self.resampler.query.device, next(self.vpm.parameters()).dtype
        patch = self.vpm.patch_size
        sizes = [patch_grid(pixels, patch) for pixels in pixel_values]
        lengths = [high * wide for high, wide in sizes]
        pixel_values = [pixels.to(device, non_blocking=True) for pixels in pixel_values]
        whole = all(not (p.shape[1] % patch or p.shape[2] % patch) for p in pixel_values)
        if whole and all(pixels.dtype == torch.uint8 for pixels in pixel_values):  # as the data set gives them: at once
            patches = normalise(torch.cat([to_patches(pixels, patch) for pixels in pixel_values]))
        else:
            normalised = (normalise(pixels) if pixels.dtype == torch.uint8 else pixels for pixels in pixel_values)
            patches = torch.cat([to_patches(pixels, patch) for pixels in normalised])
        patches = patches.to(dtype)  # (all patches, 3 * P * P)
        if self.config.llm_type == "llama3":
            spans, start = [], 0
            for count in [len(lengths)] if groups is None else groups:
                spans += [max(lengths[start : start + count], default=0)] * count
                start += count
            features = self.vpm(patches, lengths, spans)
        else:
            features = self.vpm(patches, sizes)
        if tgt_sizes is None or self.config.llm_type == "minicpm":
            tgt_sizes = torch.tensor(sizes)
        tgt_sizes = tgt_sizes.to(features.device, non_blocking=True)
        return self.resampler(features, tgt_sizes, Packing.of(lengths, features.device))

    def get_vllm_embedding(self, data: Mapping) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Token embeddings with the picture features in their places.

        Args:
            data: as in `forward`; `vision_hidden_states`, if present, is used in place of `pixel_values`.

        Returns:
            inputs_embeds (B, L, D) and, per sample, its slices' features (S_i, Q, D).
        """
        samples, length = data["input_ids"].shape
        embeds, features = self._embed(data, data["input_ids"].flatten(), [length] * samples)
        return embeds.view(samples, length, -1), features

    def _embed(
        self, data: Mapping, input_ids: torch.Tensor, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Embeddings (T, D) of the token ids (T,) of all samples, which have `lengths`, and, per sample, its slices'
        features (S_i, Q, D)."""
        starts = [0, *accumulate(lengths)][:-1]
        embeds = self._token_embeddings(input_ids, lengths, data.get("lengths"))
        if self.scale_emb != 1.0:
            embeds = embeds * self.scale_emb
        # Trained and frozen parts may have different dtypes; norms of another dtype than their input are slow.
        embeds = embeds.to(self.llm.model.norm.weight.dtype)
        per_sample = data.get("vision_hidden_states")
        if per_sample is None:
            slices = [list(sample) for sample in data.get("pixel_values") or [()] * len(starts)]
            counts = [len(sample) for sample in slices]
            groups = counts if data.get("independent_samples", False) else None
            features = self._encode_slices(slices, data.get("tgt_sizes"), groups)
        else:
            counts = [len(sample) for sample in per_sample]
            features = torch.cat([f for f in per_sample if len(f)]) if any(counts) else None
        if features is None:
            return embeds, [embeds.new_empty(0, self.config.query_num, embeds.shape[-1])] * len(starts)
        features = features.to(embeds.device, embeds.dtype)
        if not any(counts):  # a text-only batch: the vision parameters take part with nothing
            embeds = embeds + features.sum() * 0.0
            return embeds, [features[:0]] * len(starts)
        index = self._placeholder_index(data["image_bound"], counts, starts, embeds.device)
        # Out of place: with frozen embeddings `embeds` is a leaf that requires grad, which no in-place write survives.
        return embeds.index_copy(0, index, features.flatten(0, 1)), list(features.split(counts))

    def _token_embeddings(
        self, input_ids: torch.Tensor, lengths: Sequence[int], unpadded: Sequence[int] | None
    ) -> torch.Tensor:
        """(T, D). The noise of NEFTune, a hook that takes three dimensions, is scaled by the size of what is embedded
        at once: then every sample by itself, without its padding, so that its noise is that of the sample alone."""
        embedding = self.get_input_embeddings()
        if not (self.training and getattr(embedding, "neftune_noise_alpha", None)):
            return embedding(input_ids[None])[0]
        samples = zip(input_ids.split(lengths), unpadded or lengths, strict=True)
        return torch.cat([F.pad(embedding(ids[None, :n])[0], (0, 0, 0, len(ids) - n)) for ids, n in samples])

    def _encode_slices(
        self, slices: list[list[torch.Tensor]], tgt_sizes: Sequence | None, groups: Sequence[int] | None
    ) -> torch.Tensor | None:
        """(S, Q, D), or None where there is nothing to encode.

        A text-only batch encodes one black patch in training and in any distributed run: under ZeRO-3 and DDP every
        rank must pass through the same modules, or the ranks wait for each other for ever.
        """
        flat = [pixels for sample in slices for pixels in sample]
        if flat:
            if self.config.llm_type == "llama3":
                sizes = [torch.as_tensor(size) for size, sample in zip(tgt_sizes, slices, strict=True) if sample]
                tgt_sizes = torch.cat([size.view(-1, 2) for size in sizes])
                if len(tgt_sizes) != len(flat):
                    raise ValueError(f"{len(flat)} slices but tgt_sizes for {len(tgt_sizes)}")
            return self.get_vision_embedding(flat, tgt_sizes, groups)
        if self.training or torch.distributed.is_initialized():
            side = self.vpm.patch_size
            return self.get_vision_embedding([torch.zeros(3, side, side)], torch.ones(1, 2, dtype=torch.int32))
        return None

    def _placeholder_index(
        self, image_bound: Sequence, counts: Sequence[int], starts: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        """(S * Q,) places of all placeholder tokens among the tokens of all samples."""
        bounds = [torch.as_tensor(bound, dtype=torch.long).view(-1, 2) for bound in image_bound]
        for row, (bound, count) in enumerate(zip(bounds, counts, strict=True)):
            if len(bound) != count:
                raise ValueError(f"sample {row} of the batch has {count} slices but {len(bound)} image_bound entries")
        firsts = torch.cat([bound.to(device, non_blocking=True) for bound in bounds if len(bound)])[:, 0]
        offsets = torch.tensor([start for start, count in zip(starts, counts, strict=True) for _ in range(count)])
        firsts = firsts + offsets.to(device, non_blocking=True)
        return (firsts[:, None] + torch.arange(self.config.query_num, device=device)).flatten()

    def forward(
        self,
        data: Mapping,
        logits_index: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of a batch, or their loss.

        Args:
            data: `input_ids` (B, L); `pixel_values`, a list per sample of slices; `tgt_sizes` and `image_bound`, per
                sample (S_i, 2) or empty; optionally `position_ids` (B, L), `attention_mask` (B, L), and what
                `data_collator` promises or asks for: `lengths`, B numbers of tokens, and `token_index` (T,), their
                places in the flattened (B * L) batch, mean that padding stands behind the tokens only, so that it
                can be left out of all computation; `independent_samples`: True encodes every sample's slices as if
                it were alone in the batch (the original's batches of one), None or False as the original's batches
                of many.
            logits_index: (K,) positions in the flattened (B * L) batch; logits are computed there only.
            targets: (K,) the tokens to predict at `logits_index`; then the output has, in place of logits, `loss`,
                the cross entropy summed over them.
            kwargs: for the language model (`use_cache`, `past_key_values`, `output_hidden_states`).

        Returns:
            output with `logits` (B, L, vocabulary), or (K, vocabulary) with `logits_index`; with `lengths` in
            `data`, logits at padded positions mean nothing.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if self._can_pack(data, kwargs):
            outputs, hidden, logits_index = self._forward_packed(data, logits_index)
        else:
            inputs_embeds, _ = self.get_vllm_embedding(data)
            masks = {name: data.get(name) for name in ("attention_mask", "position_ids")}
            outputs = self.llm.model(inputs_embeds=inputs_embeds, **masks, **kwargs)
            hidden = outputs.last_hidden_state
            if logits_index is not None:
                hidden = hidden.flatten(0, 1)
        if logits_index is not None:
            hidden = hidden[logits_index]
        head, loss, logits = self.llm.lm_head, None, None
        if targets is not None and isinstance(head, LMHead):
            loss = head(hidden, targets, self.logits_scaling)
        else:  # the caller wants logits, or somebody (PEFT, say) put another module in the head's place
            logits = head(hidden)
            if self.logits_scaling != 1.0:
                logits = logits / self.logits_scaling
            if targets is not None:
                loss, logits = F.cross_entropy(logits.float(), targets, reduction="sum"), None
        # the cache among them, under the name that this version of transformers has for it
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def _can_pack(self, data: Mapping, kwargs: Mapping) -> bool:
        """Whether the language model can run without padding: nothing but logits is asked for, and its attention
        knows how."""
        config = self.llm.config
        return (
            data.get("lengths") is not None
            and kwargs in ({}, {"use_cache": False})
            and not config.attention_dropout
            and config._attn_implementation != "eager"
        )

    def _forward_packed(self, data: Mapping, logits_index: torch.Tensor | None):
        """Run the language model over the real tokens alone, one sample behind another.

        Returns:
            its output; the hidden states, (T, D) with `logits_index`, else (B, L, D), zero in padded places; and
            `logits_index` as places among the T tokens.
        """
        index = data["token_index"]
        packing = Packing.of(data["lengths"], index.device)
        embeds, _ = self._embed(data, data["input_ids"].flatten()[index], packing.lengths)
        _, positions = packing.places()
        outputs = self.llm.model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            # a mask of four dimensions is taken as it is; otherwise one of (T, T) would be made from the positions
            attention_mask=embeds.new_zeros(1, 1, 1, 1),
            use_cache=False,
            packing=packing,
            rotary=rotary_tables(*self.llm.model.rotary_emb(embeds, positions[None])),
        )
        hidden = outputs.last_hidden_state[0]
        if logits_index is not None:
            return outputs, hidden, torch.searchsorted(index, logits_index)
        padded = hidden.new_zeros(data["input_ids"].numel(), hidden.shape[-1]).index_copy(0, index, hidden)
        return outputs, padded.view(*data["input_ids"].shape, -1), None

    @torch.inference_mode()
    def generate(self, inputs: Mapping | torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Continue a batch of prompts, padded on the left where their lengths differ.

        Args:
            inputs: `data` as in `forward` or input ids; the entries of `data` may also be given by keyword.
            kwargs: generation arguments of transformers.

        Returns:
            (B, new tokens): the answers alone, without the prompts.
        """
        names = ("input_ids", "pixel_values", "tgt_sizes", "image_bound", "attention_mask", "vision_hidden_states")
        given = kwargs.pop("data", inputs)
        data = dict(given) if isinstance(given, Mapping) else {} if given is None else {"input_ids": given}
        data.update({name: kwargs.pop(name) for name in names if kwargs.get(name) is not None})
        kwargs.pop("position_ids", None)  # follow from the attention mask
        self.llm.generation_config = self.generation_config  # what generation_config.json of the checkpoint says
        mask = data.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(data["input_ids"])
        inputs_embeds, _ = self.get_vllm_embedding(data)
        kwargs = self._with_penalty(kwargs)
        return self.llm.generate(inputs_embeds=inputs_embeds, attention_mask=mask.long(), **kwargs)

    def _with_penalty(self, kwargs: dict) -> dict:
        """Generation arguments with the repetition penalty as a processor of its own. It counts the tokens of the
        answer alone, as in the original. transformers (5.24) does that too, but warns of it with every answer, and
        leaves out as many tokens of an answer as its prompt has padding in front."""
        settings = kwargs.get("generation_config") or self.generation_config
        penalty = kwargs.get("repetition_penalty") or settings.repetition_penalty
        if penalty in (None, 1.0):
            return kwargs
        processors = [*(kwargs.get("logits_processor") or ()), RepetitionPenaltyLogitsProcessor(float(penalty))]
        return {**kwargs, "repetition_penalty": 1.0, "logits_processor": LogitsProcessorList(processors)}

    def chat(
        self,
        image,
        msgs: str | list[dict],
        tokenizer,
        *,
        system_prompt: str = "",
        max_new_tokens: int = 1024,
        sampling: bool = True,
        max_inp_length: int = 2048,
        max_slice_nums: int | None = None,
        stream: bool = False,
        **kwargs,
    ):
        """Answer the last user message.

        Args:
            image: PIL picture, a list of them, a mapping from mark (`<image_00>`) to picture, or None.
            msgs: messages `{"role", "content"}`, the last from the user, or the same as JSON; a content may also be
                a list of texts and pictures.
            system_prompt: a system message in front (2.5 only).
            sampling: top-p sampling with the original's settings; False: beam search with 3 beams.
            max_inp_length: longest prompt, in tokens.
            max_slice_nums: most slices of a picture; None: the checkpoint's setting.
            stream: return an iterator over pieces of text as they are made (greedy, where `sampling` is False). What
                the generation raises, the iterator raises; its `close()` stops the generation.
            kwargs: generation arguments, winning over the defaults.

        Returns:
            the answer, or an iterator over its pieces.

        Raises:
            ValueError: on an empty conversation, roles out of order, or a prompt over `max_inp_length`, or behind which
                the model has no position left for an answer.
        """
        inputs = self.chat_inputs(image, msgs, tokenizer, system_prompt, max_inp_length, max_slice_nums)
        room = self.room_behind(inputs["input_ids"].shape[1])
        if max_new_tokens is not None and max_new_tokens > room:
            logger.warning("the answer can have %d tokens in place of max_new_tokens=%d", room, max_new_tokens)
            max_new_tokens = room
        settings = self.chat_settings(tokenizer, sampling, max_new_tokens=max_new_tokens, **kwargs)
        if stream:
            return self.stream_answer(inputs, tokenizer, **settings)
        return answer_text(self.generate(inputs, **settings)[0], tokenizer, stop_ids(settings))

    def chat_inputs(
        self,
        image,
        msgs: str | list[dict],
        tokenizer,
        system_prompt: str = "",
        max_inp_length: int = 2048,
        max_slice_nums: int | None = None,
    ) -> dict:
        """What `chat` gives to `generate`: `data` as in `forward`, `input_ids` (1, L). Arguments, errors as there."""
        msgs = [dict(message) for message in (json.loads(msgs) if isinstance(msgs, str) else msgs)]
        if system_prompt:
            msgs.insert(0, {"role": "system", "content": system_prompt})
        if not msgs or msgs[-1]["role"] != "user":
            raise ValueError("msgs must end with a user message; there is nothing to answer")
        if isinstance(image, Mapping):
            images = {mark: upright_rgb(picture) for mark, picture in image.items()}
        else:
            images = [] if image is None else image if isinstance(image, (list, tuple)) else [image]
            images = [upright_rgb(picture) for picture in images]
        for message in msgs:
            if not isinstance(message["content"], str):
                message["content"] = [p if isinstance(p, str) else upright_rgb(p) for p in message["content"]]
        slicing = self.config.slicing
        if max_slice_nums is not None:
            slicing["max_slice_nums"] = max_slice_nums
        sample = encode(
            msgs,
            images,
            tokenizer,
            self.config.llm_type,
            self.config.query_num,
            slicing,
            as_strips=False,
            generation_prompt=True,
        )
        if len(sample["input_ids"]) > max_inp_length:
            raising = "raise it, " if max_inp_length < self.config.max_position_embeddings else ""
            raise ValueError(
                f"the prompt has {len(sample['input_ids'])} tokens, more than max_inp_length={max_inp_length}; "
                f"{raising}shorten the conversation or lower max_slice_nums"
            )
        return {
            "input_ids": sample["input_ids"][None].to(self.get_input_embeddings().weight.device),
            "pixel_values": [sample["pixel_values"]],
            "tgt_sizes": [sample["tgt_sizes"]],
            "image_bound": [sample["image_bound"]],
        }

    def chat_settings(self, tokenizer, sampling: bool = True, **kwargs) -> dict:
        """The generation arguments of `chat`; those in `kwargs` win over its defaults."""
        stops = [tokenizer.eos_token_id]
        if self.config.llm_type == "llama3":
            stops.append(tokenizer.eot_id)
        ends = {"eos_token_id": stops, "pad_token_id": tokenizer.eos_token_id}
        return {**(SAMPLING if sampling else BEAM_SEARCH), **ends, **kwargs}

    def room_behind(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt may have: the model's positions, less the prompt's.

        Raises:
            ValueError: when that is none.
        """
        whole = self.config.max_position_embeddings
        if prompt_tokens >= whole:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, and the model takes {whole}, prompt and answer together; "
                "shorten the conversation or lower max_slice_nums"
            )
        return whole - prompt_tokens

    def stream_answer(
        self, inputs: Mapping, tokenizer, *, stopping_criteria: Sequence = (), **settings
    ) -> AnswerStream:
        """Generate one answer in a thread; its pieces can be read as they are made.

        Args:
            inputs: of one prompt, as for `generate`.
            settings: generation arguments. Beams, which cannot be streamed, are not used.
        """
        settings = {**settings, "num_beams": 1}
        return AnswerStream(
            lambda **own: self.generate(inputs, **settings, **own), tokenizer, stopping_criteria, stop_ids(settings)
        )

    @property
    def model(self) -> nn.Module:
        """The language model: peft looks here for the layers that `layer_replication` stacks anew."""
        return self.llm


MiniCPMV.register_for_auto_class("AutoModelForCausalLM")
