"""The language models: Llama 3 in 2.5, MiniCPM 2.4B in 2.0, both from transformers.

Shapes: T tokens of all samples together, H heads, C width of a head, K supervised positions, D width of the language
model, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GraniteForCausalLM, LlamaForCausalLM
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from .configuration_minicpm import MiniCPMVConfig
from .packing import Packing, packed_attention

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32


class PackedAttention:
    """Attention of a decoder layer that also takes packed sequences, at little cost for the host."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args,
        packing: Packing | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in transformers; with `packing` for (1, T, D), without a mask, and with `rotary` from `rotary_tables`."""
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        tokens = hidden_states.shape[1]
        q, k, v = (
            project(hidden_states).view(tokens, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = packed_attention(_rotate(q, *rotary), _rotate(k, *rotary), v, packing, causal=True)
        return self.o_proj(out.reshape(1, tokens, -1)), None


class PackedLlamaAttention(PackedAttention, LlamaAttention):
    """2.5's."""


class PackedGraniteAttention(PackedAttention, GraniteAttention):
    """2.0's."""


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 1, C) twice from transformers' (1, T, C): the sign that `rotate_half` changes is changed in the table."""
    first, second = sin[0].chunk(2, dim=-1)
    return cos[0][:, None], torch.cat([-first, second], dim=-1)[:, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (T, H, C): transformers' x * cos + rotate_half(x) * sin in half as many kernels."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class MiniCPMForCausalLM(GraniteForCausalLM):
    """MiniCPM 2.4B as Granite; token embeddings are multiplied by `scale_emb`, image features never are."""

    scale_emb: float = 1.0

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids) * self.scale_emb
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class LMHead(nn.Linear):
    """The output layer, which can also give the loss without ever holding the logits of all positions.

    Inside the module, so that ZeRO-3 gathers its weight once for all chunks.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None, scaling: float = 1.0) -> torch.Tensor:
        """Logits, or with targets their cross entropy.

        Args:
            hidden: (..., D), or (K, D) with targets.
            targets: (K,) token ids.
            scaling: with targets, logits are divided by it.

        Returns:
            (..., V) logits, or the cross entropy summed over K, a float32 scalar.
        """
        if targets is None:
            return super().forward(hidden)
        rows = max(1, LOGITS_AT_ONCE // self.out_features)
        total = hidden.new_zeros((), dtype=torch.float32)
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            # Logits are made anew in the backward pass: less than 1% of a step's arithmetic.
            total = total + checkpoint(
                self._cross_entropy, some, wanted, scaling, use_reentrant=False, preserve_rng_state=False
            )
        return total

    def _cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor, scaling: float) -> torch.Tensor:
        logits = super().forward(hidden).float()
        return F.cross_entropy(logits if scaling == 1.0 else logits / scaling, targets, reduction="sum")


def language_model(config: MiniCPMVConfig) -> LlamaForCausalLM | MiniCPMForCausalLM:
    """The language model of a checkpoint, under its weight names, with layers that take packed sequences."""
    llm_config = config.language_model_config()
    llm_config._attn_implementation = config._attn_implementation
    if config.llm_type == "llama3":
        llm, attention = LlamaForCausalLM(llm_config), PackedLlamaAttention
    else:
        llm, attention = MiniCPMForCausalLM(llm_config), PackedGraniteAttention
        llm.scale_emb = config.scale_emb
    norm = partial(nn.RMSNorm, config.hidden_size, eps=config.rms_norm_eps)  # one kernel, where transformers has six
    for number, layer in enumerate(llm.model.layers):
        layer.self_attn = attention(llm_config, number)
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
    llm.model.norm = norm()
    llm.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
    return llm
