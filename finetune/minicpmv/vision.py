"""Vision towers. Both take the patches of all slices of a batch one behind another, and return their features.

Shapes: S slices, N patches of one slice, T patches of all slices together, P patch side in pixels, V vision width.
A strip is a slice's patches side by side, row by row: (3, P, N * P).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionAttention, Idefics2VisionTransformer

from .packing import Packing, packed_attention


def patch_grid(pixels: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """(patches high, patches wide) of a picture (3, H, W); a patch that is cut off by the border counts."""
    return -(-pixels.shape[1] // patch_size), -(-pixels.shape[2] // patch_size)


def to_strip(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut a picture (3, H, W) into patches, row by row, and lay them side by side: (3, P, N * P).

    A strip (H == patch_size) comes back as it is. Sides that are no multiple of `patch_size` are padded with zeros
    on the right and below (timm's `dynamic_img_pad`).

    Example: (3, 28, 42) with P = 14 gives (3, 14, 84); patch 4 of the strip is row 1, column 1.
    """
    channels, height, width = pixels.shape
    rows, columns = patch_grid(pixels, patch_size)
    if (rows * patch_size, columns * patch_size) != (height, width):
        pixels = F.pad(pixels, (0, columns * patch_size - width, 0, rows * patch_size - height))
    if rows > 1:
        pixels = pixels.view(channels, rows, patch_size, columns * patch_size)
        pixels = pixels.transpose(1, 2).reshape(channels, patch_size, rows * columns * patch_size)
    return pixels


def to_patches(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(N, 3 * P * P): the patches of a picture (3, H, W) or of a strip, row by row, each as a convolution reads it.

    Sides that are no multiple of `patch_size` are padded with zeros, as in `to_strip`.

    Example: (3, 28, 42) with P = 14 gives (6, 588); row 4 is the patch in row 1, column 1.
    """
    channels, height, width = pixels.shape
    rows, columns = patch_grid(pixels, patch_size)
    if (rows * patch_size, columns * patch_size) != (height, width):
        pixels = F.pad(pixels, (0, columns * patch_size - width, 0, rows * patch_size - height))
    pixels = pixels.reshape(channels, rows, patch_size, columns, patch_size)
    return pixels.permute(1, 3, 0, 2, 4).reshape(rows * columns, channels * patch_size * patch_size)


class PatchEmbedding(nn.Conv2d):
    """A convolution whose kernel is as large as its stride, with its parameters, on patches that are cut already."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(T, 3 * P * P) -> (T, V)"""
        return F.linear(patches, self.weight.flatten(1), self.bias)


@functools.lru_cache(maxsize=1024)
def strip_position_ids(patches: int, per_side: int, device: torch.device | None = None) -> torch.Tensor:
    """(N,) position ids of a strip of N patches, by the rule the checkpoints were trained with.

    The original hands every slice to the tower as a picture one patch high, so a patch's id is its place along the
    strip in 70 buckets, whatever the slice's real height. The rounding at the bucket edges is that of
    Idefics2VisionEmbeddings up to transformers 4.53 and matters; 4.57 computes other ids.
    """
    with torch.device("cpu"):  # the rounding is that of the CPU
        boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side)
        places = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(patches))
    return torch.bucketize(places, boundaries, right=True).to(device)


class StripAttention(Idefics2VisionAttention):
    """Attention of 2.5's tower on packed strips, whose `Packing` is `attention_mask`. Without attention dropout, which
    the checkpoint does not have either."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Packing, **_) -> tuple[torch.Tensor, None]:
        """(T, V) -> (T, V)"""
        shape = len(hidden_states), self.num_heads, self.head_dim
        q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(packed_attention(q, k, v, attention_mask).flatten(1)), None


class StripVisionTransformer(Idefics2VisionTransformer):
    """2.5's `vpm`: SigLIP so400m in Idefics2's layout, on strips. Weight names as in transformers.

    The original meant to mask the padding of shorter strips but indexed its mask in the wrong dimension
    (`patch_attn_mask[i, :n] = True` on a mask of shape (S, 1, N)): in every picture, the shorter strips attend to
    their zero padding and take the position ids of the longest strip. The checkpoint was trained and is used that
    way, so it is kept: `spans` says how far along its strip each slice sees.
    """

    def __init__(self, config: Idefics2VisionConfig):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.embeddings.patch_embedding = PatchEmbedding(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )
        for layer in self.encoder.layers:
            layer.self_attn = StripAttention(config)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.layers

    def forward(self, patches: torch.Tensor, lengths: Sequence[int], spans: Sequence[int]) -> torch.Tensor:
        """Features of every patch.

        Args:
            patches: (T, 3 * P * P), those of all slices one behind another, in the tower's dtype.
            lengths: patches of each slice.
            spans: places (patches and padding) of each slice's strip that attention covers.

        Returns:
            (T, V)
        """
        padding = patches.new_zeros(max(spans) - min(lengths), patches.shape[1])
        pieces = [
            piece
            for strip, length, span in zip(patches.split(lengths), lengths, spans, strict=True)
            for piece in (strip, padding[: span - length])
        ]
        x = self.embeddings.patch_embedding(torch.cat(pieces))  # (spans together, V)
        per_side = self.embeddings.num_patches_per_side
        ids = torch.cat([strip_position_ids(span, per_side, x.device) for span in spans])
        x = x + self.embeddings.position_embedding(ids)
        x = self.encoder(inputs_embeds=x, attention_mask=Packing.of(spans, x.device)).last_hidden_state
        if list(lengths) != list(spans):
            x = torch.cat([strip[:length] for strip, length in zip(x.split(spans), lengths, strict=True)])
        return self.post_layernorm(x)


class SliceAttention(timm.layers.Attention):
    """Attention of 2.0's tower on packed slices; `attn_mask` is their `Packing`."""

    def forward(self, x: torch.Tensor, attn_mask: Packing, is_causal: bool = False) -> torch.Tensor:
        """(T, V) -> (T, V)"""
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, self.head_dim).unbind(1)
        x = packed_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, causal=is_causal)
        return self.proj(self.norm(x.flatten(1)))


class TimmVisionTower(nn.Module):
    """2.0's `vpm`: the parts of a timm VisionTransformer, run on the packed patches of all slices.

    timm's own forward takes one picture size per batch; this one takes all slices of a micro-batch at once.
    Class and register tokens, where the model has them, are attended to and cut off from the output.

    Args:
        name: timm model name, `vit_so400m_patch14_siglip_384.webli` in the checkpoint.
        drop_last_layer: leave out the last block (the checkpoint has no weights for it).
    """

    def __init__(self, name: str, drop_last_layer: bool):
        super().__init__()
        # weight_init="skip": timm's own initialisation fails on parameters that ZeRO-3 has already partitioned;
        # ours runs in MiniCPMV._init_weights, for what no checkpoint gave.
        vit = timm.create_model(
            name,
            pretrained=False,
            num_classes=0,
            dynamic_img_size=True,
            weight_init="skip",
            attn_layer=SliceAttention,
        )
        self.patch_size = vit.patch_embed.patch_size[0]
        self.width = vit.embed_dim
        self.grid_size = vit.patch_embed.grid_size
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.prefix_has_positions = not vit.no_embed_class
        self.patch_embed = vit.patch_embed
        self.patch_embed.proj = PatchEmbedding(
            vit.patch_embed.proj.in_channels,
            self.width,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            bias=vit.patch_embed.proj.bias is not None,
        )
        self.cls_token = vit.cls_token
        self.reg_token = vit.reg_token
        self.pos_embed = vit.pos_embed
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks[:-1] if drop_last_layer else vit.blocks
        self.norm = vit.norm
        self.gradient_checkpointing = False  # switched by PreTrainedModel.activation_checkpointing_enable

    def forward(self, patches: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Features of every patch.

        Args:
            patches: (T, 3 * P * P), those of all slices one behind another, in the tower's dtype.
            sizes: patches (high, wide) of each slice.

        Returns:
            (T, V)
        """
        x = self.patch_embed.norm(self.patch_embed.proj(patches))  # (T, V)
        prefix_positions, positions = self._positions(sizes)
        x = x + positions
        lengths = [high * wide for high, wide in sizes]
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            prefix = torch.cat(prefix, dim=1)[0]
            if prefix_positions is not None:
                prefix = prefix + prefix_positions
            x = torch.cat([piece for one in x.split(lengths) for piece in (prefix, one)])
        x = self.norm_pre(x)
        with_prefix = [self.num_prefix_tokens + length for length in lengths]
        packing = Packing.of(with_prefix, x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                function = getattr(block, "_gradient_checkpointing_func", self._gradient_checkpointing_func)
                x = function(block.__call__, x, packing)
            else:
                x = block(x, packing)
        if self.num_prefix_tokens:
            x = torch.cat([one[self.num_prefix_tokens :] for one in x.split(with_prefix)])
        return self.norm(x)

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def _positions(self, sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(prefix, V) or None, and (T, V): the stored grid resampled once for each distinct slice size."""
        with_prefix = self.num_prefix_tokens if self.prefix_has_positions else 0
        prefix = self.pos_embed[0, :with_prefix] if with_prefix else None
        grid = self.pos_embed[:, with_prefix:]
        by_size = {
            size: resample_abs_pos_embed(grid, list(size), list(self.grid_size), num_prefix_tokens=0)[0]
            for size in dict.fromkeys(sizes)
        }
        return prefix, torch.cat([by_size[size] for size in sizes])
