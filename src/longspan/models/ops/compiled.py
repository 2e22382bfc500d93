"""The operations between matrix products as compiled kernels, on a CPU in fp32.

It owns the calls; what they compute is in `compiled/kernels.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from longspan.compiled.library import address, library
from longspan.models.ops.base import BlockPanels, Panels, RopeTable, Table
from longspan.models.ops.plain import PlainOps


class CompiledOps(PlainOps):
    """See `LayerOps`. What a step does once, or few models need, stays PyTorch's."""

    def __init__(self) -> None:
        self._library = library()

    def norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """See `LayerOps.norm`."""
        if x.dim() != 2:
            return super().norm(x, weight, eps, out)
        rows, width = x.shape
        out = x.new_empty(rows, width) if out is None else out
        self._library.norm(
            address(x), x.stride(0), None, 0, None, address(weight), address(out), out.stride(0), rows, width, eps
        )
        return out

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `LayerOps.add_norm`."""
        rows, width = x.shape
        total, out = x.new_empty(2, rows, width)
        self._library.norm(
            address(x), x.stride(0), address(residual), residual.stride(0), address(total), address(weight),
            address(out), width, rows, width, eps,
        )  # fmt: skip
        return total, out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `LayerOps.swiglu`."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._library.swiglu(address(gate_up), gate_up.stride(0), out.data_ptr(), rows, width)
        return out

    def embed(self, token_ids: Tensor, table: Table, first: int | None) -> Tensor:
        """See `LayerOps.embed`."""
        if isinstance(table, BlockPanels):
            return self._embed_blocks(token_ids, table, first)
        values, rows = (table.values, table.rows) if isinstance(table, Panels) else (table, table.shape[0])
        width = values.shape[2] if isinstance(table, Panels) else 1
        token_ids = token_ids.contiguous()
        out = values.new_empty(len(token_ids), values.shape[1])
        self._library.lookup(
            token_ids.data_ptr(), len(token_ids), first or 0, address(values), rows, values.shape[1], width,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def _embed_blocks(self, token_ids: Tensor, table: BlockPanels, first: int | None) -> Tensor:
        token_ids = token_ids.contiguous()
        out = table.scales.new_empty(len(token_ids), table.width)
        self._library.lookup_blocks(
            token_ids.data_ptr(), len(token_ids), first or 0, *table.addresses, table.rows, table.width, table.bits,
            table.block_width, out.data_ptr(),
        )  # fmt: skip
        return out

    def rope_table(self, positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> RopeTable:
        """See `LayerOps.rope_table`."""
        rows, half = len(positions), len(inverse)
        cos, sin = inverse.new_empty(2, rows, 1, 2 * half)
        self._library.rope_table(
            positions.contiguous().data_ptr(), address(inverse), factor, cos.data_ptr(), sin.data_ptr(), rows, half
        )
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
        if interleaved:
            super().rope(heads, table, norms, eps, interleaved)
            return
        cos, sin, dim = address(table.cos), address(table.sin), table.cos.shape[-1]
        for x, weight in zip_longest(heads, norms):
            self._library.rope(
                address(x), x.stride(0), x.stride(1), cos, sin, None if weight is None else address(weight), eps,
                *x.shape, dim,
            )  # fmt: skip
