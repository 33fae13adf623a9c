"""MiniCPM-Llama3-V 2.5 and MiniCPM-V 2.0: vision tower `vpm`, `resampler` and language model `llm`.

Shapes: B samples, L tokens of the longest sample, S slices in the whole batch, N patches of the longest slice,
Q query tokens per slice, D width of the language model. Labels are shifted by the dataset, never here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from threading import Thread

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    TextIteratorStreamer,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_minicpm import MiniCPMVConfig
from .conversation import encode
from .image_slicing import normalise, upright_rgb
from .resampler import Resampler
from .vision import StripVisionTransformer, TimmVisionTower, length_mask, pad_strips, patch_grid, to_strip


class MiniCPMForCausalLM(GraniteForCausalLM):
    """MiniCPM 2.4B as Granite; token embeddings are multiplied by `scale_emb`, image features never are."""

    scale_emb: float = 1.0

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids) * self.scale_emb
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """The model of either checkpoint, told apart by its config, under the checkpoint's weight names."""

    config_class = MiniCPMVConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["LlamaDecoderLayer", "GraniteDecoderLayer", "Idefics2EncoderLayer", "Block", "Resampler"]

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        llm_config = config.llm_config()
        llm_config._attn_implementation = config._attn_implementation
        if config.llm_type == "llama3":
            self.llm = LlamaForCausalLM(llm_config)
            vision_config = config.vision_tower_config()
            vision_config._attn_implementation = config._attn_implementation
            self.vpm = StripVisionTransformer(vision_config)
        else:
            self.llm = MiniCPMForCausalLM(llm_config)
            self.llm.scale_emb = config.scale_emb
            self.vpm = TimmVisionTower(config.vision_encoder, config.drop_vision_last_layer)
        self.scale_emb = config.scale_emb or 1.0
        self.logits_scaling = getattr(llm_config, "logits_scaling", 1.0)
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

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As in transformers; the model code travels along, so the folder loads with `trust_remote_code=True`."""
        self.config.auto_map = {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": "modeling_minicpmv.MiniCPMV",
            "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
        }
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
        sizes = [patch_grid(pixels, self.vpm.patch_size) for pixels in pixel_values]
        pixel_values = [pixels.to(device, non_blocking=True) for pixels in pixel_values]
        pixel_values = [normalise(pixels) if pixels.dtype == torch.uint8 else pixels for pixels in pixel_values]
        strips = [to_strip(pixels, self.vpm.patch_size) for pixels in pixel_values]
        lengths = [high * wide for high, wide in sizes]
        spans, start = [], 0
        for count in [len(lengths)] if groups is None else groups:
            spans += [max(lengths[start : start + count], default=0)] * count
            start += count
        takes_spans = self.config.llm_type == "llama3"
        features = self.vpm(pad_strips(strips).to(dtype), spans if takes_spans else sizes)  # (S, N, V)
        if tgt_sizes is None or self.config.llm_type == "minicpm":
            tgt_sizes = torch.tensor(sizes)
        tgt_sizes = tgt_sizes.to(features.device, non_blocking=True)
        return self.resampler(features, tgt_sizes, length_mask(lengths, features.device))

    def get_vllm_embedding(self, data: Mapping) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Token embeddings with the picture features in their places.

        Args:
            data: as in `forward`; `vision_hidden_states`, if present, is used in place of `pixel_values`.

        Returns:
            inputs_embeds (B, L, D) and, per sample, its slices' features (S_i, Q, D).
        """
        input_ids = data["input_ids"]
        embeds = self.get_input_embeddings()(input_ids)
        if self.scale_emb != 1.0:
            embeds = embeds * self.scale_emb
        per_sample = data.get("vision_hidden_states")
        if per_sample is None:
            slices = [list(sample) for sample in data.get("pixel_values") or [()] * len(input_ids)]
            counts = [len(sample) for sample in slices]
            groups = counts if data.get("independent_samples", False) else None
            features = self._encode_slices(slices, data.get("tgt_sizes"), groups)
        else:
            counts = [len(sample) for sample in per_sample]
            features = torch.cat([f for f in per_sample if len(f)]) if any(counts) else None
        if features is None:
            return embeds, [embeds.new_empty(0, self.config.query_num, embeds.shape[-1])] * len(input_ids)
        features = features.to(embeds.device, embeds.dtype)
        if not any(counts):  # a text-only batch: the vision parameters take part with nothing
            embeds = embeds + features.sum() * 0.0
            return embeds, [features[:0]] * len(input_ids)
        index = self._placeholder_index(data["image_bound"], counts, embeds)
        # Out of place: with frozen embeddings `embeds` is a leaf that requires grad, which no in-place write survives.
        embeds = embeds.flatten(0, 1).index_copy(0, index, features.flatten(0, 1)).view_as(embeds)
        return embeds, list(features.split(counts))

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

    def _placeholder_index(self, image_bound: Sequence, counts: list[int], embeds: torch.Tensor) -> torch.Tensor:
        """(S * Q,) positions of all placeholder tokens in the flattened (B * L) batch."""
        starts = []
        for row, (bound, count) in enumerate(zip(image_bound, counts, strict=True)):
            bound = torch.as_tensor(bound, dtype=torch.long).view(-1, 2)
            if len(bound) != count:
                raise ValueError(f"sample {row} of the batch has {count} slices but {len(bound)} image_bound entries")
            starts.append(bound[:, 0].to(embeds.device, non_blocking=True) + row * embeds.shape[1])
        offsets = torch.arange(self.config.query_num, device=embeds.device)
        return (torch.cat(starts)[:, None] + offsets).flatten()

    def forward(self, data: Mapping, logits_index: torch.Tensor | None = None, **kwargs) -> CausalLMOutputWithPast:
        """Logits of a batch.

        Args:
            data: `input_ids` (B, L); `pixel_values`, a list per sample of slices; `tgt_sizes` and `image_bound`, per
                sample (S_i, 2) or empty; optionally `position_ids` (B, L), `attention_mask` (B, L), and what
                `data_collator` promises or asks for: `right_padded`: True means that padding stands behind the
                tokens only, where causal attention never looks, so that no mask and no positions are needed and
                the fastest kernels run; `independent_samples`: True encodes every sample's slices as if it were
                alone in the batch (the original's batches of one), None or False as the original's batches of many.
            logits_index: (K,) positions in the flattened (B * L) batch; logits are computed there only.
            kwargs: for the language model (`use_cache`, `past_key_values`, `output_hidden_states`).

        Returns:
            output with `logits` (B, L, vocabulary), or (K, vocabulary) with `logits_index`.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        inputs_embeds, _ = self.get_vllm_embedding(data)
        if not data.get("right_padded", False):
            kwargs.update(attention_mask=data.get("attention_mask"), position_ids=data.get("position_ids"))
        outputs = self.llm.model(inputs_embeds=inputs_embeds, **kwargs)
        hidden = outputs.last_hidden_state
        if logits_index is not None:
            hidden = hidden.flatten(0, 1)[logits_index]
        logits = self.llm.lm_head(hidden)
        if self.logits_scaling != 1.0:
            logits = logits / self.logits_scaling
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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
        return self.llm.generate(inputs_embeds=inputs_embeds, attention_mask=mask.long(), **kwargs)

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
            stream: return an iterator over pieces of text as they are made.
            kwargs: generation arguments, winning over the defaults.

        Returns:
            the answer, or an iterator over its pieces.

        Raises:
            ValueError: on an empty conversation, roles out of order, or a prompt over `max_inp_length`.
        """
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
            raise ValueError(
                f"the prompt has {len(sample['input_ids'])} tokens, more than max_inp_length={max_inp_length}; "
                "raise it, shorten the conversation or lower max_slice_nums"
            )
        defaults = (
            {"do_sample": True, "top_p": 0.8, "top_k": 100, "temperature": 0.7, "repetition_penalty": 1.05}
            if sampling
            else {"num_beams": 3, "repetition_penalty": 1.2, "do_sample": False}
        )
        stops = [tokenizer.eos_token_id]
        if self.config.llm_type == "llama3":
            stops.append(tokenizer.eot_id)
        settings = {
            **defaults,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": stops,
            "pad_token_id": tokenizer.eos_token_id,
            **kwargs,
        }
        inputs = {
            "input_ids": sample["input_ids"][None].to(self.get_input_embeddings().weight.device),
            "pixel_values": [sample["pixel_values"]],
            "tgt_sizes": [sample["tgt_sizes"]],
            "image_bound": [sample["image_bound"]],
        }
        if not stream:
            answer = self.generate(inputs, **settings)[0]
            return tokenizer.decode(answer, skip_special_tokens=True).strip()
        streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        # Beam search cannot stream.
        settings.update(streamer=streamer, num_beams=1)

        def run() -> None:
            try:
                self.generate(inputs, **settings)
            except BaseException:
                streamer.end()  # or the reader waits for ever
                raise

        Thread(target=run, daemon=True).start()
        return iter(streamer)

    @property
    def model(self) -> nn.Module:
        """The language model: peft looks here for the layers that `layer_replication` stacks anew."""
        return self.llm


MiniCPMV.register_for_auto_class("AutoModelForCausalLM")
