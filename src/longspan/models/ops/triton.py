"""The operations between matrix products in one Triton kernel each.

It owns the launches: their shapes, strides and tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from longspan.early_launch import early_options
from longspan.models.ops.base import RopeTable, Table, plain_table
from longspan.models.ops.kernels import (
    clamped_swiglu_kernel,
    embed_kernel,
    norm_kernel,
    rope_kernel,
    rope_table_kernel,
    sum_kernel,
    swiglu_kernel,
)
from longspan.models.ops.plain import SWISH_SLOPE

_COLUMNS = 1024  # elements of a row that one program of a pointwise kernel computes
_MANY_ROWS = 1024
_TILES = (1, 1024), (16, 128)  # rows and columns that one program activates, for few rows and for many
_PAIRS = 1024  # pairs of elements that one program of `rope_kernel` rotates
_WARPS = 4


class TritonOps:
    """See `LayerOps`. Tensors without rows launch nothing."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """See `LayerOps.norm`."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        _norm(x, None, weight, x, out, eps)
        return out

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `LayerOps.add_norm`."""
        total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        _norm(x, residual, weight, total, out, eps)
        return total, out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `LayerOps.swiglu`."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        if rows:
            block = _TILES[rows >= _MANY_ROWS]
            swiglu_kernel[(triton.cdiv(rows, block[0]), triton.cdiv(width, block[1]))](
                gate_up, out, rows, gate_up.stride(0), width,
                EXACT=gate_up.is_cuda, ROWS=block[0], BLOCK=block[1], num_warps=_WARPS,
                **early_options(gate_up.device),
            )  # fmt: skip
        return out

    def clamped_swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        """See `LayerOps.clamped_swiglu`."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        if rows:
            clamped_swiglu_kernel[(rows, triton.cdiv(width, _COLUMNS))](
                gate_up, out, gate_up.stride(0), width, limit, SWISH_SLOPE,
                EXACT=gate_up.is_cuda, BLOCK=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
        return out

    def rope_table(self, positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> RopeTable:
        """See `LayerOps.rope_table`."""
        rows, half = positions.shape[0], inverse.shape[0]
        cos, sin = (torch.empty(rows, 1, 2 * half, dtype=dtype, device=positions.device) for _ in range(2))
        if rows:
            rope_table_kernel[(rows,)](
                positions, inverse, cos, sin, factor,
                HALF=half, BLOCK=triton.next_power_of_2(half), EXACT=positions.is_cuda, num_warps=1,
            )  # fmt: skip
        return RopeTable(cos, sin)

    def rope(
        self,
        heads: Sequence[Tensor],
        table: RopeTable,
        norms: Sequence[Tensor] = (),
        eps: float = 0.0,
        interleaved: bool = False,
    ) -> None:
        """See `LayerOps.rope`."""
        q, k = heads[0], heads[-1]
        rows, q_heads, width = q.shape
        k_heads = k.shape[1] if len(heads) > 1 else 0
        if not rows:
            return
        dim = table.cos.shape[-1]
        half = triton.next_power_of_2(dim // 2)
        together = min(max(1, _PAIRS // half), triton.next_power_of_2(max(q_heads, k_heads)))
        weights = norms or (table.cos,)
        rope_kernel[(rows, triton.cdiv(q_heads, together) + triton.cdiv(k_heads, together))](
            q, k, weights[0], weights[-1], table.cos, table.sin, q.stride()[:2], k.stride()[:2], q_heads, k_heads, eps,
            WIDTH=width, DIM=dim, INTERLEAVED=interleaved, NORM=bool(norms),
            HEADS=together, HALF=half, REST=triton.next_power_of_2(max(1, width - dim)), num_warps=_WARPS,
            **early_options(q.device),
        )  # fmt: skip

    def embed(self, token_ids: Tensor, table: Table, first: int | None) -> Tensor:
        """See `LayerOps.embed`."""
        table = plain_table(table)
        if first is None:
            return F.embedding(token_ids, table)
        rows, width = token_ids.shape[0], table.shape[1]
        out = table.new_empty(rows, width)
        if rows:
            embed_kernel[(rows, triton.cdiv(width, _COLUMNS))](
                token_ids, table, out, first, table.shape[0], width, BLOCK=_COLUMNS, num_warps=_WARPS
            )
        return out

    def sum_of_places(self, found: Tensor, places: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
        """See `LayerOps.sum_of_places`. Sums are in fp32 and rounded once."""
        rows, hidden = places.shape[0], found.shape[1]
        out = found.new_empty(rows, hidden)
        if rows:
            sum_kernel[(rows, triton.cdiv(hidden, _COLUMNS))](
                found, places.contiguous(), weights.contiguous(), stops[-1:], out,
                CHOSEN=places.shape[1], HIDDEN=hidden, COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
        return out


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor, out: Tensor, eps: float) -> None:
    """Launch the norm of x [T, width] into `out`, or that of residual + x, whose sum goes into `total`."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    other = x if residual is None else residual
    if rows:
        norm_kernel[(rows,)](
            x, other, weight, total, out, (x.stride(0), other.stride(0), out.stride(0)), eps,
            WIDTH=width, BLOCK=block, ADD=residual is not None, num_warps=min(16, max(_WARPS, block // 1024)),
            **early_options(x.device),
        )  # fmt: skip
