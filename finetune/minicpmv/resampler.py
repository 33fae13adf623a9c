"""Resampler: compresses the patches of each slice into a fixed number of query tokens by one cross attention.

Shapes: S slices, T patches of all slices together, Q queries, V vision width, D language model width, H heads.
Parameter names are those of the checkpoints (`nn.MultiheadAttention` names under `attn`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .packing import Packing, packed_attention

HEAD_DIM = 128  # both checkpoints: heads = hidden size / 128


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention`'s arithmetic and parameter names on packed slices, with one shared query for all.

    Why not `nn.MultiheadAttention`: it pads, projects the same query once per slice, and reads `out_proj.weight`
    past the module's forward, which ZeRO-3 cannot see.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
        """query (Q, D); key, value (T, D) of S slices -> (S, Q, D)."""
        slices, queries, width = len(packing.lengths), *query.shape
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)

        def heads(x: torch.Tensor) -> torch.Tensor:  # (L, D) -> (L, H, D / H)
            return x.view(len(x), self.num_heads, width // self.num_heads)

        q = heads(F.linear(query, w_q, b_q)).repeat(slices, 1, 1)
        k, v = heads(F.linear(key, w_k, b_k)), heads(F.linear(value, w_v, b_v))
        out = packed_attention(q, k, v, Packing.of([queries] * slices, key.device), packing)  # (S * Q, H, D / H)
        return self.out_proj(out.reshape(slices, queries, width))


class Resampler(GradientCheckpointingLayer):
    """`num_queries` learned queries look at the patches of each slice.

    keys = ln_kv(kv_proj(x)) + positions, values = ln_kv(kv_proj(x)), queries = ln_q(query) [+ pos_embed in 2.0],
    output = ln_post(attention) @ proj. The position of the patch in row r, column c is the sin-cos code of c
    in the first half of the width and of r in the second (MAE's 2-D table, width first).

    Args:
        num_queries: Q, 96 in 2.5 and 64 in 2.0.
        embed_dim: D, width of the language model.
        kv_dim: V, width of the vision tower.
        query_positions: 2.0 stores `pos_embed` (Q, D) and adds it to the queries.
    """

    def __init__(self, num_queries: int, embed_dim: int, kv_dim: int, query_positions: bool):
        super().__init__()
        self.embed_dim = embed_dim
        self.query = nn.Parameter(torch.empty(num_queries, embed_dim))
        # A buffer: the checkpoint stores it, the original never trains it.
        self.register_buffer("pos_embed", torch.empty(num_queries, embed_dim) if query_positions else None)
        # no kv_proj where the widths agree, as in the original
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False) if kv_dim != embed_dim else nn.Identity()
        self.attn = CrossAttention(embed_dim, max(1, embed_dim // HEAD_DIM))
        self.ln_q = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_post = nn.LayerNorm(embed_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(embed_dim, embed_dim))
        self._axis_table: torch.Tensor | None = None

    def init_parameters(self) -> None:
        """Random values for the parameters that no checkpoint gave (called by `MiniCPMV._init_weights`)."""
        init.normal_(self.query, std=0.02)
        init.normal_(self.proj, std=self.embed_dim**-0.5)
        init.xavier_uniform_(self.attn.in_proj_weight)
        init.zeros_(self.attn.in_proj_bias)
        if self.pos_embed is not None:
            side = round(self.pos_embed.shape[0] ** 0.5)
            table = sincos_axis_table(side, self.embed_dim // 2)
            row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            init.copy_(self.pos_embed, torch.cat([table[column.flatten()], table[row.flatten()]], dim=1))

    def forward(self, x: torch.Tensor, tgt_sizes: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Compress every slice to Q tokens.

        Args:
            x: (T, V) patches of all slices one behind another, each slice's row by row.
            tgt_sizes: (S, 2) integers, patches (high, wide) of each slice, on the device of `x`.
            packing: the slices.

        Returns:
            (S, Q, D)
        """
        x = self.ln_kv(self.kv_proj(x))  # (T, D)
        query = self.ln_q(self.query)  # (Q, D)
        if self.pos_embed is not None:
            query = query + self.pos_embed
        out = self.attn(query, x + self._positions(x, tgt_sizes, packing), x, packing)
        return self.ln_post(out) @ self.proj

    def _positions(self, x: torch.Tensor, tgt_sizes: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(T, D) position codes; patch n of a slice of width w stands in row n // w, column n % w."""
        longest, table = packing.longest, self._axis_table
        if table is None or table.shape[0] < longest or table.device != x.device or table.dtype != x.dtype:
            # One axis of the table is enough and small; no row or column index can exceed the patches of a slice.
            table = sincos_axis_table(max(longest, 2048), self.embed_dim // 2).to(x.device, x.dtype)
            self._axis_table = table
        sequence, place = packing.places()
        wide = tgt_sizes[:, 1].long()[sequence]
        return torch.cat([table[place % wide], table[place // wide]], dim=-1)


def sincos_axis_table(length: int, width: int) -> torch.Tensor:
    """(length, width) float32: [sin(p * w_i), cos(p * w_i)], w_i = 10000 ** (-i / (width / 2)) (as in MAE)."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()
