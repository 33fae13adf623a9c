"""Resampler: compresses the patches of each slice into a fixed number of query tokens by one cross attention.

Shapes: S slices, N patches of the longest slice, Q queries, V vision width, D language model width, H heads.
Parameter names are those of the checkpoints (`nn.MultiheadAttention` names under `attn`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

HEAD_DIM = 128  # both checkpoints: heads = hidden size / 128


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention`'s arithmetic and parameter names with SDPA and one shared query for all slices.

    Why not `nn.MultiheadAttention`: it projects the same query once per slice, and it reads `out_proj.weight`
    past the module's forward, which ZeRO-3 cannot see.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None):
        """query (Q, D); key, value (S, N, D); key_mask (S, N) bool, True = attend, or None -> (S, Q, D)."""
        slices, _, width = key.shape
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)

        def heads(x: torch.Tensor) -> torch.Tensor:  # (S or 1, L, D) -> (S or 1, H, L, D / H)
            return x.view(x.shape[0], x.shape[1], self.num_heads, width // self.num_heads).transpose(1, 2)

        q = heads(F.linear(query, w_q, b_q)[None]).expand(slices, -1, -1, -1)
        k, v = heads(F.linear(key, w_k, b_k)), heads(F.linear(value, w_v, b_v))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (S, H, Q, D / H)
        return self.out_proj(out.transpose(1, 2).reshape(slices, query.shape[0], width))


class Resampler(nn.Module):
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

    def forward(self, x: torch.Tensor, tgt_sizes: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compress every slice to Q tokens.

        Args:
            x: (S, N, V) patches, row by row, padded to the longest slice.
            tgt_sizes: (S, 2) integers, patches (high, wide) of each slice, on the device of `x`.
            key_mask: (S, N) bool, False on padding; None when no slice is padded.

        Returns:
            (S, Q, D)
        """
        x = self.ln_kv(self.kv_proj(x))  # (S, N, D)
        query = self.ln_q(self.query)  # (Q, D)
        if self.pos_embed is not None:
            query = query + self.pos_embed
        out = self.attn(query, x + self._positions(x, tgt_sizes), x, key_mask)
        return self.ln_post(out) @ self.proj

    def _positions(self, x: torch.Tensor, tgt_sizes: torch.Tensor) -> torch.Tensor:
        """(S, N, D) position codes; patch n of a slice of width w stands in row n // w, column n % w."""
        patches = x.shape[1]
        table = self._axis_table
        if table is None or table.shape[0] < patches or table.device != x.device:
            # One axis of the table is enough and small; no row or column index can exceed N.
            table = sincos_axis_table(max(patches, 2048), self.embed_dim // 2).to(x.device)
            self._axis_table = table
        index = torch.arange(patches, device=x.device)
        wide = tgt_sizes[:, 1:].to(index.dtype)
        column, row = index % wide, index // wide  # (S, N)
        return torch.cat([table[column], table[row]], dim=-1).to(x.dtype)


def sincos_axis_table(length: int, width: int) -> torch.Tensor:
    """(length, width) float32: [sin(p * w_i), cos(p * w_i)], w_i = 10000 ** (-i / (width / 2)) (as in MAE)."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()
