"""Attention with plain tensor operations, on any device and in any dtype.

It is used where no kernel can be, and kernels are compared with it. It owns the blocks that bound the memory of scores;
it must not know about ranks or schedules, nor of pages more than the spans of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.backends.base import AttentionBackend
from longspan.attention.backends.plain import PlainBackend, SegmentedDiagonal
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState, merge
from longspan.cache.pages import clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

_SCORES = 1 << 24  # most scores that are held at once, over all heads
_ROWS = 256  # most query tokens of a block


class TorchBackend(PlainBackend):
    """softmax(q kᵀ · scale) v, block by block, in fp32 or wider for inputs of any dtype."""

    causal_runs = True

    def __init__(self, device: torch.device, max_scores: int = _SCORES) -> None:
        super().__init__(device)
        self._max_scores = max_scores

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> _Runs:
        """See `Backend.prepare`."""
        return _Runs(tuple(runs), self._max_scores)

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(segments, window, self._max_scores)


@dataclass(frozen=True)
class _Runs:
    """See `PreparedRuns`."""

    # the runs as they are: nothing is prepared
    runs: tuple[QueryRun, ...]
    # most scores that are held at once
    max_scores: int

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
            for rows in _cut(run.row, run.row + run.length, _ROWS):
                parts = [AttentionState(whole.out[rows], whole.lse[rows])]
                ends = run.ends[rows.start - run.row : rows.stop - run.row]
                for at in _cut(0, max(ends), _keys_at_once(q[rows], self.max_scores)):
                    within = kv.take(clip_spans(run.spans, at.start, at.stop)).read(q.dtype)
                    seen = _seen(run, rows, at, q.device)
                    parts = [merge([*parts, _attend(q[rows], within[0], within[-1], blocks, scale, seen)])]
                whole.out[rows], whole.lse[rows] = parts[0].out, parts[0].lse
        return whole


class _Diagonal(SegmentedDiagonal):
    """See `PreparedDiagonal`."""

    def __init__(self, segments: Sequence[tuple[int, int]], window: int | None, max_scores: int) -> None:
        super().__init__(segments)
        self.window = window  # tokens that a row sees, its own included; None for all
        self.max_scores = max_scores  # most scores that are held at once

    def segment(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """See `SegmentedDiagonal.segment`."""
        window = self.window
        whole = AttentionState.empty(q.shape[0], q.shape[1], v.shape[-1], q)
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        numbers = torch.arange(q.shape[0], device=q.device)
        for rows in _cut(0, q.shape[0], _ROWS):
            first = 0 if window is None else max(0, rows.start + 1 - window)
            parts: list[AttentionState] = []
            for at in _cut(first, rows.stop, _keys_at_once(q[rows], self.max_scores)):
                back = numbers[rows, None] - numbers[at]
                seen = back >= 0 if window is None else (back >= 0) & (back < window)
                part = _attend(q[rows], keys[:, at], values[:, at], blocks, scale, seen)
                parts = [merge([*parts, part])]
            whole.out[rows], whole.lse[rows] = parts[0].out, parts[0].lse
        return whole


def _seen(run: QueryRun, rows: slice, at: slice, device: torch.device) -> Tensor | None:
    """bool [T, L]: which of a run's slots `at` each of `rows` sees; None if every row sees all of them."""
    within = slice(rows.start - run.row, rows.stop - run.row)
    numbers = torch.arange(at.start, at.stop, device=device)
    seen = None
    if run.window_starts is not None:
        seen = numbers >= torch.tensor(run.window_starts[within], device=device)[:, None]
    if run.causal and run.ends[within][0] < at.stop:
        before = numbers < torch.tensor(run.ends[within], device=device)[:, None]
        seen = before if seen is None else seen & before
    return seen


def _keys_at_once(q: Tensor, max_scores: int) -> int:
    """Number of keys in a block for q [T, Hq, D]."""
    return max(1, max_scores // (q.shape[0] * q.shape[1]))


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    """[start, stop) as slices of up to `size`."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Sequence[HeadBlock], scale: float, seen: Tensor | None
) -> AttentionState:
    """q [T, Hq, D] against keys [Hkv, L, D] and values [Hkv, L, Dv]; `seen` [T, L] bool, None if all keys are seen.

    The query heads of a KV head are packed as rows of one product.
    """
    part = AttentionState.empty(q.shape[0], q.shape[1], values.shape[-1], q)
    wide = part.out.dtype
    for block in blocks:
        heads, held = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
        packed = q[:, heads].reshape(len(q), block.kv_heads, block.group, -1).transpose(0, 1).flatten(1, 2).to(wide)
        scores = torch.bmm(packed, keys[held].to(wide).transpose(1, 2)).mul_(scale)
        if seen is not None:
            scores.masked_fill_(~seen.repeat_interleave(block.group, dim=0), float("-inf"))
        lse = torch.logsumexp(scores, -1)
        base = torch.where(torch.isneginf(lse), 0.0, lse)[..., None]  # weights of 0, not NaN, for a row without keys
        out = torch.bmm(scores.sub_(base).exp_(), values[held].to(wide))
        shape = (block.kv_heads, len(q), block.group)
        part.out[:, heads] = out.view(*shape, -1).transpose(0, 1).flatten(1, 2)
        part.lse[:, heads] = lse.view(shape).transpose(0, 1).flatten(1, 2)
    return part


BACKEND = AttentionBackend(
    "torch",
    devices=(),
    supports=lambda shape: None,
    build=lambda device, shape: TorchBackend(device),
    device_slots=True,
)
