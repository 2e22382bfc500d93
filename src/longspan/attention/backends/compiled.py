"""Attention on a CPU with compiled kernels, in fp32, on pages in fp32 or with quantised keys and values.

It owns how a step's runs are cut into tiles for the kernels; it must not know about ranks or schedules, nor of pages
more than the spans of a run.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from longspan.attention.backends.base import AttentionBackend, BackendShape, RecordableBackend
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.rows import CacheRows, unit_stride
from longspan.attention.state import AttentionState
from longspan.attention.step_buffer import StepBuffer
from longspan.compiled.library import address, library, problem_of_kernels
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun

_TILE_ROWS = 192  # pairs of token and query head in a tile, which read a key once
_FEW_ROWS = 8  # such pairs up to which a tile's tokens are divided, so that one long context occupies several cores
_TOKENS = 256  # tokens of such a division
_FORMATS = {torch.float32: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # `Format` in `cache_rows.h`
_RUNS_WORDS, _WRITES_WORDS, _PART_WORDS = 8, 3, 4  # of `Runs`, `Writes` and `Part` in `attention.h`


class CompiledBackend(CpuBackend, RecordableBackend):
    """Attends to pages in place. Segments read their own tokens from the cache, together with earlier ones."""

    causal_runs = True

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> CompiledRuns:
        """See `Backend.prepare`."""
        return CompiledRuns(runs, rows)

    def refillable(self, rows: int, slots: int, buffer: StepBuffer) -> CompiledRuns:
        """See `RecordableBackend.refillable`. Rows of no run are left as they are."""
        return CompiledRuns((), rows, covers_all=True)

    def writer(self, writes: Sequence[WriteRun], rows: int, buffer: StepBuffer | None = None) -> CompiledWriter:
        """See `Backend.writer`."""
        return CompiledWriter(writes)


class _Record:
    """Integers and addresses at a fixed address, where a kernel reads them: `Runs` or `Writes` in `attention.h`."""

    def __init__(self, words: int) -> None:
        self._words = (ctypes.c_int64 * words)()
        self._held: tuple[array[int], ...] = ()
        self.address = ctypes.addressof(self._words)

    def fill(self, words: Sequence[int], held: tuple[array[int], ...]) -> None:
        """Replace the words; `held` are the integers to whose addresses they refer."""
        self._words[:] = list(words)
        self._held = held


class CompiledRuns:
    """See `PreparedRuns` and `RefillableRuns`."""

    def __init__(self, runs: Sequence[QueryRun], rows: int, covers_all: bool = False) -> None:
        """`covers_all`: whether all rows that will be used are known to be in runs."""
        self._library = library()
        self._rows = rows
        self._always_covers = covers_all
        self._records: dict[int, _Record] = {}  # by size of group
        self.fill(runs)

    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """See `RefillableRuns.fill`."""
        self._runs = tuple(runs)
        self._covers_all = self._always_covers or sum(run.length for run in self._runs) == self._rows
        self._spans = array("q", chain.from_iterable(chain.from_iterable(run.spans for run in self._runs)))
        # by row, the tokens [start, stop) of its run that it sees
        self._starts, self._stops = array("q", bytes(8 * self._rows)), array("q", bytes(8 * self._rows))
        for run in self._runs:
            within = slice(run.row, run.row + run.length)
            self._stops[within] = array("q", run.ends)
            if run.window_starts is not None:
                self._starts[within] = array("q", run.window_starts)
        for group, record in self._records.items():
            self._cut(group, record)
        return True

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
        for block in blocks:
            # heads of a block are adjacent, so pointers to its first ones are enough
            self._library.attend(
                address(q[:, block.q_start :]), q.stride(0), q.stride(1), *_pools_of(kv, block.kv_start),
                address(whole.out[:, block.q_start :]), whole.lse[:, block.q_start :].data_ptr(), heads,
                block.kv_heads, block.group, dim, scale, self._record_of(block.group).address,
            )  # fmt: skip
        return whole

    def _record_of(self, group: int) -> _Record:
        """What the kernel reads for heads that are read by `group` query heads each."""
        found = self._records.get(group)
        if found is None:
            found = self._records[group] = _Record(_RUNS_WORDS)
            self._cut(group, found)
        return found

    def _cut(self, group: int, record: _Record) -> None:
        """Cut the runs into tiles, longest first. Of a few rows the tokens are divided, and joined by a part."""
        tiles: list[tuple[int, ...]] = []
        parts = array("q")
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
                parts.extend((row, rows, divided, len(cuts)))
                for start in cuts:
                    end = min(start + _TOKENS, stop)
                    tiles.append((row, rows, span, len(run.spans), start, end, divided))
                    divided += rows
            span += len(run.spans)
        tiles.sort(key=lambda tile: (tile[4] - tile[5]) * tile[1])
        held = array("q", chain.from_iterable(tiles)), parts, self._spans, self._starts, self._stops
        tile, part, spans, starts, stops = (integers.buffer_info()[0] for integers in held)
        record.fill((tile, len(tiles), part, len(parts) // _PART_WORDS, divided, spans, starts, stops), held)


class CompiledWriter:
    """A `RefillableWriter` that copies rows to their slots, a layer's keys and values in one call."""

    def __init__(self, writes: Sequence[WriteRun]) -> None:
        self._library = library()
        self._record = _Record(_WRITES_WORDS)
        self.refill(writes)

    def refill(self, writes: Sequence[WriteRun]) -> None:
        """See `RefillableWriter.refill`."""
        held = tuple(
            array("q", chain.from_iterable(range(first, first + run.length) for run, first in pairs))
            for pairs in ([(run, run.row) for run in writes], [(run, run.slot) for run in writes])
        )
        rows, slots = held
        self._record.fill((rows.buffer_info()[0], slots.buffer_info()[0], len(rows)), held)

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """See `Writer.write`."""
        k, v, has_values = unit_stride(k), unit_stride(v), len(cache.values) > 1
        words, _, _, slot, kind = _pools_of(cache, 0)
        self._library.write(
            address(k), k.stride(0), k.stride(1), address(v) if has_values else None, v.stride(0), v.stride(1),
            words, slot, kind, *k.shape[1:], self._record.address,
        )  # fmt: skip


def _pools_of(kv: CacheRows, head: int) -> tuple[int, int, int, int, int]:
    """How the kernels read rows from a head on: address and number of pools, the head, stride of slots, format."""
    kind = _FORMATS.get(kv.values.dtype)
    if kind is None or kv.values.stride(-1) != 1 or len(kv.groups) > 1:
        raise TypeError(f"a compiled kernel does not read rows in {kv.values.dtype} with scales for {kv.groups}")
    return kv.pool_words.buffer_info()[0], 1 + len(kv.peers), head, kv.values.stride(2), kind


def _problem(shape: BackendShape) -> str | None:
    """See `AttentionBackend.supports`."""
    if not shape.compiled:
        return "is left out (--cpu-kernels)"
    if shape.dtype != torch.float32:
        return "computes in fp32"
    if shape.quantised and shape.kv_factor == 1:
        return "reads quantised keys and values, not quantised latents"
    if problem := problem_of_kernels():
        return f"has no kernels: {problem}"
    lanes = library().lanes()
    return f"takes rows of a multiple of {lanes} elements, not {shape.head_dim}" if shape.head_dim % lanes else None


BACKEND = AttentionBackend(
    "compiled",
    devices=("cpu",),
    supports=_problem,
    build=lambda device, shape: CompiledBackend(),
    device_slots=True,
)
