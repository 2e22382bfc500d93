"""A backend of somebody else's: every query row by itself, in float64.

It is slow, and does nothing but what a backend's file may.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.backends.base import AttentionBackend, BackendShape
from longspan.attention.backends.plain import PlainBackend
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun


class OneByOne(PlainBackend):
    """Keeps what it has prepared, which counts how often it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[Runs] = []

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> "Runs":
        self.prepared.append(Runs(runs))
        return self.prepared[-1]

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> "Diagonal":
        return Diagonal(segments, window)


@dataclass
class Runs:
    runs: Sequence[QueryRun]
    used: int = 0

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        self.used += 1
        whole = AttentionState.empty(q.shape[0], q.shape[1], kv.width, q)
        for run in self.runs:
            seen = kv.take(run.spans).read(q.dtype)
            for number in range(run.length):
                first = run.window_starts[number] if run.window_starts else 0
                one_row(whole, q, run.row + number, seen[0][:, first:], seen[-1][:, first:], blocks, scale)
        return whole


@dataclass(frozen=True)
class Diagonal:
    segments: Sequence[tuple[int, int]]
    window: int | None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        values = k if v is None else v
        whole = AttentionState.empty(q.shape[0], q.shape[1], values.shape[-1], q)
        for row, first in ((at, start) for start, length in self.segments for at in range(start, start + length)):
            seen = slice(max(first, row + 1 - (self.window or len(q))), row + 1)
            one_row(whole, q, row, k[seen].transpose(0, 1), values[seen].transpose(0, 1), blocks, scale)
        return whole


def one_row(
    whole: AttentionState, q: Tensor, row: int, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float
) -> None:
    """Put softmax(q kᵀ · scale) v of one row, k and v [Hkv, S, D], in its place."""
    if not k.shape[1]:
        return
    for block in blocks:
        for head in range(block.q_start, block.q_stop):
            kv_head = block.kv_start + (head - block.q_start) // block.group
            scores = k[kv_head].double() @ q[row, head].double() * scale
            whole.lse[row, head] = torch.logsumexp(scores, 0)
            whole.out[row, head] = torch.softmax(scores, 0) @ v[kv_head].double()


def supports(shape: BackendShape) -> str | None:
    return "reads no quantised cache" if shape.quantised else None


BACKEND = AttentionBackend("one_by_one", (), supports, lambda device, shape: OneByOne(), automatic=False)
