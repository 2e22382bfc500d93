"""What all backends of plain tensor operations share: writing to slots, merging states, and diagonals one by one.

It owns these operations; attention itself is implemented by each backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.attention.backends.base import Backend, PreparedDiagonal, Writer
from longspan.attention.pool import DeviceSlotWriter, SlotWriter
from longspan.attention.state import AttentionState, concatenate, merge
from longspan.parallel.heads import HeadBlock
from longspan.plan.view import WriteRun


class PlainBackend(Backend):
    """A `Backend` without attention, on any device."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._device = device

    def writer(self, writes: Sequence[WriteRun], rows: int) -> Writer:
        """See `Backend.writer`."""
        return SlotWriter(writes, rows, self._device)

    def slot_writer(self, slots: Tensor) -> Writer:
        """See `Backend.slot_writer`."""
        return DeviceSlotWriter(slots)

    def merge(self, parts: Sequence[AttentionState], dtype: torch.dtype | None = None) -> AttentionState:
        """See `Backend.merge`."""
        return merge(parts)


class SegmentedDiagonal(ABC):
    """A `PreparedDiagonal` that is computed segment by segment."""

    def __init__(self, segments: Sequence[tuple[int, int]]) -> None:
        self._segments = segments  # (first row, length), in order

    @abstractmethod
    def segment(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """Causal attention of one segment to itself: as `PreparedDiagonal.attend`, of the segment's rows."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedDiagonal.attend`."""
        v = k if v is None else v
        parts: list[AttentionState] = []
        at = 0
        for row, length in [*self._segments, (len(q), 0)]:
            if row > at:
                parts.append(AttentionState.empty(row - at, q.shape[1], v.shape[-1], q))
            at = row + length
            if length:
                parts.append(self.segment(q[row:at], k[row:at], v[row:at], blocks, scale))
        return concatenate(parts)


class LibraryDiagonal(SegmentedDiagonal):
    """A `PreparedDiagonal` by a library's kernels, or by another one for shapes that the library cannot compute."""

    def __init__(
        self, library: Any, segments: Sequence[tuple[int, int]], window: int | None, plain: PreparedDiagonal
    ) -> None:
        super().__init__(segments)
        self.library = library  # the imported package
        self.window = window  # tokens that a row sees, its own included; None for all
        self._plain = plain  # for other shapes

    @abstractmethod
    def takes(self, q: Tensor, v: Tensor) -> bool:
        """Whether the library can compute queries [T, Hq, D] with values [T, Hkv, Dv]."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedDiagonal.attend`."""
        attend = super().attend if self.takes(q, k if v is None else v) else self._plain.attend
        return attend(q, k, v, blocks, scale, dtype)
