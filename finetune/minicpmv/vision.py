"""Vision towers. Both take slices as strips of patches, padded to one batch, and return patch features.

Shapes: S slices, N patches of the longest slice, P patch side in pixels, V vision width.
A strip is a slice's patches side by side, row by row: (3, P, N * P). One convolution over a batch of strips embeds
every patch of every slice, whatever the slices' own heights and widths.
"""

from __future__ import annotations

import functools

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import Idefics2VisionConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer


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


def pad_strips(strips: list[torch.Tensor]) -> torch.Tensor:
    """(S, 3, P, N * P): strips of different lengths, padded with zeros to the longest."""
    longest = max(strip.shape[-1] for strip in strips)
    return torch.stack([F.pad(s, (0, longest - s.shape[-1])) if s.shape[-1] < longest else s for s in strips])


def length_mask(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """(S, max(lengths)) bool, True on the first `lengths[s]` places; None when all are equal.

    Lengths are known on the host, so nothing waits for the device.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return mask.to(device, non_blocking=True)


@functools.lru_cache(maxsize=1024)
def strip_position_ids(patches: int, per_side: int) -> torch.Tensor:
    """(N,) position ids of a strip of N patches, by the rule the checkpoints were trained with.

    The original hands every slice to the tower as a picture one patch high, so a patch's id is its place along the
    strip in 70 buckets, whatever the slice's real height. The rounding at the bucket edges is that of
    Idefics2VisionEmbeddings up to transformers 4.53 and matters; 4.57 computes other ids.
    """
    boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side)
    places = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(patches))
    return torch.bucketize(places, boundaries, right=True)


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

    @property
    def width(self) -> int:
        return self.config.hidden_size

    def forward(self, pixel_values: torch.Tensor, spans: list[int]) -> torch.Tensor:
        """Features of every patch.

        Args:
            pixel_values: (S, 3, P, N * P), zero padded strips in the tower's dtype.
            spans: places (patches and padding) of each strip that attention covers.

        Returns:
            (S, N, V)
        """
        x = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (S, N, V)
        ids = torch.zeros(x.shape[:2], dtype=torch.long)
        for row, span in enumerate(spans):
            ids[row, :span] = strip_position_ids(span, self.embeddings.num_patches_per_side)
        x = x + self.embeddings.position_embedding(ids.to(x.device, non_blocking=True))
        mask = self._attention_mask(x, length_mask(spans, x.device))
        return self.post_layernorm(self.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state)

    def _attention_mask(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None:
            return None
        if self.config._attn_implementation == "sdpa":
            # what create_bidirectional_mask gives, without its look at the mask's values (a device synchronisation)
            return mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        return create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=mask)


class TimmVisionTower(nn.Module):
    """2.0's `vpm`: the parts of a timm VisionTransformer, run on a padded batch of strips.

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
        vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, weight_init="skip")
        self.patch_size = vit.patch_embed.patch_size[0]
        self.width = vit.embed_dim
        self.grid_size = vit.patch_embed.grid_size
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.prefix_has_positions = not vit.no_embed_class
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token
        self.reg_token = vit.reg_token
        self.pos_embed = vit.pos_embed
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks[:-1] if drop_last_layer else vit.blocks
        self.norm = vit.norm
        self.gradient_checkpointing = False  # switched by PreTrainedModel.activation_checkpointing_enable

    def forward(self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Features of every patch.

        Args:
            pixel_values: (S, 3, P, N * P), zero padded strips in the tower's dtype.
            sizes: patches (high, wide) of each slice; a slice sees its own patches and no padding.

        Returns:
            (S, N, V)
        """
        x = self.patch_embed.norm(self.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2))  # (S, N, V)
        slices, patches, _ = x.shape
        prefix_positions, positions = self._positions(sizes, patches)
        x = x + positions
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            prefix = torch.cat(prefix, dim=1)
            if prefix_positions is not None:
                prefix = prefix + prefix_positions
            x = torch.cat([prefix.expand(slices, -1, -1), x], dim=1)
        x = self.norm_pre(x)
        mask = length_mask([high * wide for high, wide in sizes], x.device)
        if mask is not None:
            mask = F.pad(mask, (self.num_prefix_tokens, 0), value=True)[:, None, None, :]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, mask)
            else:
                x = block(x, mask)
        return self.norm(x)[:, self.num_prefix_tokens :]

    def _positions(self, sizes: list[tuple[int, int]], patches: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(1, prefix, V) or None, and (S, N, V): the stored grid resampled once for each distinct slice size."""
        with_prefix = self.num_prefix_tokens if self.prefix_has_positions else 0
        prefix = self.pos_embed[:, :with_prefix] if with_prefix else None
        grid = self.pos_embed[:, with_prefix:]
        by_size = {}
        for size in dict.fromkeys(sizes):
            one = resample_abs_pos_embed(grid, list(size), list(self.grid_size), num_prefix_tokens=0)
            by_size[size] = F.pad(one, (0, 0, 0, patches - one.shape[1]))
        return prefix, torch.cat([by_size[size] for size in sizes])
