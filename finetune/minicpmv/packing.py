"""Sequences of different lengths behind one another, without padding, and attention within each of them.

Shapes: T tokens of all sequences together, H heads, G heads of keys and values (H is a multiple of G), C width of a
head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Packing(NamedTuple):
    """Where each sequence lies among T tokens. Lengths are known on the host, so that nothing waits for the device."""

    lengths: tuple[int, ...]
    longest: int
    bounds: torch.Tensor
    """(sequences + 1,) int32, on the device: sequence i is at bounds[i] to bounds[i + 1], the end excluded"""
    flash: bool
    """whether the device has the flash kernel"""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(tuple(lengths), max(lengths), bounds.to(device, non_blocking=True), _has_flash_kernel(device))

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) int64 twice, on the device: the sequence of each token, and its place in that sequence."""
        total, bounds = sum(self.lengths), self.bounds.long()
        numbers = torch.arange(len(self.lengths), device=bounds.device)
        sequence = torch.repeat_interleave(numbers, bounds.diff(), output_size=total)
        return sequence, torch.arange(total, device=bounds.device) - bounds[sequence]


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    key_packing: Packing | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot product attention, every sequence by itself; scores are divided by the root of C.

    On GPUs from Ampere on, in half precision, one flash kernel for all sequences; elsewhere SDPA for one after another.

    Args:
        query: (T, H, C).
        key, value: (T', G, C).
        key_packing: sequences of keys and values, where they are not the queries'.
        causal: a token sees itself and what stands before it in its sequence.

    Returns:
        (T, H, C)
    """
    key_packing = key_packing or packing
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for SDPA
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packing.flash and query.dtype in (torch.bfloat16, torch.float16) and query.shape[2] % 8 == 0:
        return _flash_attention(query, key, value, packing, key_packing, causal)
    sequences = zip(
        query.split(packing.lengths), key.split(key_packing.lengths), value.split(key_packing.lengths), strict=True
    )
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), is_causal=causal, enable_gqa=grouped)
        for qkv in sequences
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


@functools.lru_cache
def _has_flash_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    key_packing: Packing,
    causal: bool,
) -> torch.Tensor:
    """PyTorch's flash kernel for sequences of different lengths, forward and backward.

    Not by `torch.nn.attention.varlen`, which leads to the same kernel through a custom operator in Python: 0.74 ms of
    host time forth and back where this takes 0.31 (torch 2.11), in a step that waits for the host. To go when that
    costs no more.
    """
    dropout, debug_mask = 0.0, False
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        packing.bounds,
        key_packing.bounds,
        packing.longest,
        key_packing.longest,
        dropout,
        causal,
        debug_mask,
    )[0]
