"""The reference for tests: attention by its definition, in any dtype.

It owns the formula only; it must be simple, and need not be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.backends.plain import PlainBackend, SegmentedDiagonal
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun


class ReferenceBackend(PlainBackend):
    """softmax(q kᵀ · scale) v, head by head."""

    causal_runs = True

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> _Runs:
        """See `Backend.prepare`."""
        return _Runs(tuple(runs))

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(segments, window)


@dataclass(frozen=True)
class _Runs:
    """See `PreparedRuns`."""

    # the runs as they are: nothing is prepared
    runs: tuple[QueryRun, ...]

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        whole = AttentionState.empty(q.shape[0], q.shape[1], kv.width, q)
        for run in self.runs:
            values = kv.take(run.spans).read(q.dtype)
            rows = slice(run.row, run.row + run.length)
            window_starts = torch.tensor(run.window_starts or (0,) * run.length)
            number = torch.arange(run.tokens)
            mask = (number >= window_starts[:, None]) & (number < torch.tensor(run.ends)[:, None])
            part = _attend(q[rows], values[0], values[-1], blocks, scale, mask)
            whole.out[rows], whole.lse[rows] = part.out, part.lse
        return whole


class _Diagonal(SegmentedDiagonal):
    """See `PreparedDiagonal`."""

    def __init__(self, segments: Sequence[tuple[int, int]], window: int | None) -> None:
        super().__init__(segments)
        self.window = window  # tokens that a row sees, its own included; None for all

    def segment(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """See `SegmentedDiagonal.segment`."""
        mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril()
        if self.window is not None:
            mask = mask.triu(1 - self.window)
        return _attend(q, k.transpose(0, 1), v.transpose(0, 1), blocks, scale, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float, mask: Tensor) -> AttentionState:
    """q [T, Hq, D] against k and v [Hkv, L, D]; `mask` [T, L] is True for the keys that a row sees."""
    part = AttentionState.empty(q.shape[0], q.shape[1], v.shape[-1], q)
    for block in blocks:
        for head in range(block.q_start, block.q_stop):
            kv_head = block.kv_start + (head - block.q_start) // block.group
            scores = (q[:, head] @ k[kv_head].T * scale).masked_fill(~mask, float("-inf"))
            part.lse[:, head] = torch.logsumexp(scores, -1)
            part.out[:, head] = torch.nan_to_num(torch.softmax(scores, -1)) @ v[kv_head]
    return part
