"""Attention on a CPU with compiled kernels, in fp32 on pages that are not quantised.

It owns how a step's runs are cut into tiles for the kernels; it must not know about ranks or schedules, nor of pages
more than the spans of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from longspan.attention.backends.base import AttentionBackend, BackendShape
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.rows import CacheRows, unit_stride
from longspan.attention.state import AttentionState
from longspan.compiled.library import address, library, problem_of_kernels
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun

_TILE_ROWS = 192  # pairs of token and query head in a tile, which read a key once
_FEW_ROWS = 8  # such pairs up to which a tile's tokens are divided, so that one long context occupies several cores
_TOKENS = 256  # tokens of such a division


class CompiledBackend(CpuBackend):
    """Attends to pages in place. Segments read their own tokens from the cache, together with earlier ones."""

    causal_runs = True

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> CompiledRuns:
        """See `Backend.prepare`."""
        return CompiledRuns(runs, rows)

    def writer(self, writes: Sequence[WriteRun], rows: int) -> CompiledWriter:
        """See `Backend.writer`."""
        return CompiledWriter(writes, rows)


@dataclass(frozen=True)
class _Tiles:
    """The work of a step for one size of group, as the kernel reads it: see `Tile` and `Part` in `kernels.cpp`."""

    # int64 [tiles, 7], longest first
    tiles: Tensor
    # int64 [parts, 4]: rows whose tokens are divided
    parts: Tensor
    # rows of results over divided tokens
    divided_rows: int


class CompiledRuns:
    """See `PreparedRuns`."""

    def __init__(self, runs: Sequence[QueryRun], rows: int) -> None:
        self._library = library()
        self._runs = runs
        self._covers_all = sum(run.length for run in runs) == rows
        spans = list(chain.from_iterable(span for run in runs for span in run.spans))
        self._spans = torch.tensor(spans, dtype=torch.int64)
        # by row, the tokens [start, stop) of its run that it sees
        self._starts = torch.zeros(rows, dtype=torch.int64)
        self._stops = torch.zeros(rows, dtype=torch.int64)
        for run in runs:
            within = slice(run.row, run.row + run.length)
            self._stops[within] = torch.tensor(run.ends)
            if run.window_starts is not None:
                self._starts[within] = torch.tensor(run.window_starts)
        self._tiles: dict[int, _Tiles] = {}  # by size of group

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        rows, heads, dim = q.shape
        if self._covers_all:
            whole = AttentionState(q.new_empty(rows, heads, dim), q.new_empty(rows, heads))
        else:
            whole = AttentionState.empty(rows, heads, dim, q)
        q = unit_stride(q)
        keys, values = kv.values[0], kv.values[-1]
        for block in blocks:
            work = self._tiles_of(block.group)
            results = q.new_empty(work.divided_rows * block.kv_heads * block.group * (dim + 1))
            # heads of a block are adjacent, so pointers to its first ones are enough
            self._library.attend(
                address(q[:, block.q_start :]), q.stride(0), q.stride(1), address(keys[block.kv_start :]),
                address(values[block.kv_start :]), keys.stride(0), keys.stride(1),
                address(whole.out[:, block.q_start :]), whole.lse[:, block.q_start :].data_ptr(), heads,
                block.kv_heads, block.group, dim, scale, work.tiles.data_ptr(), len(work.tiles),
                self._spans.data_ptr(), self._starts.data_ptr(), self._stops.data_ptr(), work.parts.data_ptr(),
                len(work.parts), results.data_ptr(),
            )  # fmt: skip
        return whole

    def _tiles_of(self, group: int) -> _Tiles:
        found = self._tiles.get(group)
        if found is None:
            found = self._tiles[group] = self._cut(group)
        return found

    def _cut(self, group: int) -> _Tiles:
        tiles: list[tuple[int, ...]] = []
        parts: list[tuple[int, ...]] = []
        span, divided, most = 0, 0, max(1, _TILE_ROWS // group)
        for run in self._runs:
            for row in range(run.row, run.row + run.length, most):
                rows = min(most, run.row + run.length - row)
                first = run.window_starts[row - run.row] if run.window_starts else 0
                stop = run.ends[row + rows - 1 - run.row]
                cuts = range(first, stop, _TOKENS) if rows * group <= _FEW_ROWS else ()
                if len(cuts) < 2:
                    tiles.append((row, rows, span, len(run.spans), first, stop, -1))
                    continue
                parts.append((row, rows, divided, len(cuts)))
                for start in cuts:
                    end = min(start + _TOKENS, stop)
                    tiles.append((row, rows, span, len(run.spans), start, end, divided))
                    divided += rows
            span += len(run.spans)
        tiles.sort(key=lambda tile: (tile[4] - tile[5]) * tile[1])
        return _Tiles(
            torch.tensor(tiles, dtype=torch.int64).view(-1, 7), torch.tensor(parts, dtype=torch.int64).view(-1, 4),
            divided,
        )  # fmt: skip


class CompiledWriter:
    """A `Writer` that copies rows to their slots, a layer's keys or values in one call."""

    def __init__(self, writes: Sequence[WriteRun], rows: int) -> None:
        self._library = library()
        slots = [slot for run in writes for slot in range(run.slot, run.slot + run.length)]
        index = [row for run in writes for row in range(run.row, run.row + run.length)]
        self._slots = torch.tensor(slots, dtype=torch.int64)  # [R]: the slots that are written
        self._rows = torch.tensor(index, dtype=torch.int64)  # [R]: the rows that go there

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """See `Writer.write`."""
        for plane, rows in zip(cache.values, (k, v), strict=False):
            rows = unit_stride(rows)
            self._library.write(
                address(rows), rows.stride(0), rows.stride(1), address(plane), plane.stride(0), plane.stride(1),
                self._rows.data_ptr(), self._slots.data_ptr(), len(self._slots), *rows.shape[1:],
            )  # fmt: skip


def _problem(shape: BackendShape) -> str | None:
    """See `AttentionBackend.supports`."""
    if not shape.compiled:
        return "is left out (--cpu-kernels)"
    if shape.quantised or shape.dtype != torch.float32:
        return "computes in fp32, on a cache in fp32"
    if problem := problem_of_kernels():
        return f"has no kernels: {problem}"
    lanes = library().lanes()
    return f"takes rows of a multiple of {lanes} elements, not {shape.head_dim}" if shape.head_dim % lanes else None


BACKEND = AttentionBackend(
    "compiled",
    devices=("cpu",),
    supports=_problem,
    build=lambda device, shape: CompiledBackend(),
)
