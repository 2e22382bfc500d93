"""The operations between a layer's matrix products, as models call them.

It owns this interface. An implementation serves one kind of device, and models do not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """The rotation of each row of a step, computed once and used in every layer, in the model's dtype."""

    # [T, 1, rotary dim]; the second half repeats the first
    cos: Tensor
    # [T, 1, rotary dim]; the first half is the second, negated
    sin: Tensor


@dataclass(frozen=True)
class Panels:
    """A weight [rows, width] in panels of adjacent rows, as compiled kernels multiply by it."""

    # fp32 [panels, width, rows of a panel]; the last panel may have more rows than the weight
    values: Tensor
    # of the weight
    rows: int


@dataclass(frozen=True)
class BlockPanels:
    """Likewise a weight [rows, width] in blocks of `block_width` codes: see `QuantisedBlocks`."""

    # int32 [panels, width / codes of an integer, rows of a panel]
    codes: Tensor
    # fp32 [panels, width / block_width, rows of a panel]
    scales: Tensor
    # as `scales`; None if there are none
    offsets: Tensor | None
    # of the weight
    rows: int
    # of the weight
    width: int
    # of a code
    bits: int
    # columns of a block
    block_width: int

    @property
    def addresses(self) -> tuple[int, int, int | None]:
        """Of codes, scales and offsets, as kernels take them."""
        offsets = None if self.offsets is None else self.offsets.data_ptr()
        return self.codes.data_ptr(), self.scales.data_ptr(), offsets


Table = Tensor | Panels | BlockPanels
"""A part of an embedding table [rows, hidden]."""


def plain_table(table: Table) -> Tensor:
    """The table as a tensor. Raises `TypeError` for panels, which only compiled operations read."""
    if not isinstance(table, Tensor):
        raise TypeError("an embedding table in panels is for compiled operations")
    return table


class LayerOps(Protocol):
    """The operations between matrix products. Rows of arguments may be strided; their last dimension is not."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """x [T, width] / rms(x) · weight [width], in fp32 (Zhang & Sennrich 2019) → `out` or a new tensor.

        Where x has 16 bits, it is rounded before it is multiplied by the weight. `out` may be x.
        """

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(residual + x, the norm of this sum), all [T, width]."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 · width], gate before up → silu(gate) · up [T, width] (Shazeer 2020)."""

    def clamped_swiglu(self, gate_up: Tensor, limit: float) -> Tensor:
        """gate_up [T, 2 · width], interleaved → gate · sigmoid(1.702 · gate) · (up + 1) [T, width] (gpt-oss).

        Before that gate is clamped to at most `limit`, and up to [-limit, limit].
        """

    def rope_table(self, positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> RopeTable:
        """The table of int64 positions [T], for inverse frequencies [rotary dim / 2] and a factor on cos and sin."""

    def rope(
        self,
        heads: Sequence[Tensor],
        table: RopeTable,
        norms: Sequence[Tensor] = (),
        eps: float = 0.0,
        interleaved: bool = False,
    ) -> None:
        """Rotate the first elements of every head in place, as many as the table has.

        `heads` are one or two tensors [T, H, D]. With `norms` [D], one for each of them, heads are normalised first.
        Elements half the rotary dim apart form a pair (the rotate-half convention). If they are `interleaved`, adjacent
        elements do, and the result has them half the rotary dim apart.
        """

    def embed(self, token_ids: Tensor, table: Table, first: int | None) -> Tensor:
        """int64 token_ids [T] → [T, hidden]: rows of `table`, the part [first, first + rows) of the vocabulary.

        Token ids outside this part give zeros, so that the sum over the TP group is the embedding. If `first` is None,
        the table is that of all tokens.
        """

    def sum_of_places(self, found: Tensor, places: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
        """The weighted sums [T, hidden] of rows found [P, hidden] at `places` int64 [T, k], weights [T, k] fp32.

        Rows from the last of `stops` on are in no group of a grouped product: they were not written, may hold NaN, and
        are not added.
        """
