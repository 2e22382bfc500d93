"""Decode steps of fixed size, recorded once and replayed: a CUDA graph in place of Python between the kernels.

It owns the sizes, the buffers a recording reads and their filling; it must not know what a plan decides, nor where
rows live. Every choice here follows from what all ranks know alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import StaticBackend, StaticWriter
from longspan.models.context import Model
from longspan.plan.plan import StepPlan
from longspan.plan.reach import Block, QueryRun, Reach
from longspan.plan.view import ClassView, RankView

_SCHEDULES = {"local", "gather_q"}
_STEP = 8  # sizes beyond the small ones are multiples of this
_SMALL = (1, 2, 4)


class Recorder(Protocol):
    """Makes a recording of work whose inputs and results stay at one address."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run the work once; what is returned does the same again with what its inputs then hold."""
        ...


class EagerRecorder:
    """The slow twin: runs the work anew, and like a graph leaves its result where the last one was."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Recorder.record`."""
        result = work()
        return lambda: result.copy_(work())


class CudaRecorder:
    """CUDA graphs that share one pool of memory, since no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one: cuBLAS keeps 32 MiB for each

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Recorder.record`. The first run, outside the capture, compiles kernels and makes buffers."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def padded_rows(rows: int) -> int:
    """The least size of a recording that has room for `rows`."""
    return next((size for size in _SMALL if size >= rows), -(-rows // _STEP) * _STEP)


def recordable(plan: StepPlan) -> bool:
    """Whether a step is one token of each of some decoding requests, by schedules of fixed shape."""
    plain = all(not s.prefill and s.length == 1 and s.sample == 1 for s in plan.segments)
    return bool(plan.segments) and plain and set(plan.decode_schedules) <= _SCHEDULES


def of_one_kind(plan: StepPlan) -> StepPlan:
    """The same step with all rows travelling if any does: how many stay at home must not change a recording's shape."""
    kinds = len(plan.decode_schedules)
    if not any(segment.travels for segment in plan.segments):
        return plan
    segments = tuple(replace(segment, travels=kinds) for segment in plan.segments)
    return replace(plan, segments=segments, decode_schedules=("gather_q",) * kinds)


@dataclass(frozen=True)
class _Size:
    rows: int
    travels: bool


class Recordings:
    """All recordings of one rank, made when a size is first met."""

    def __init__(
        self, model: Model, attention: Attention, backend: StaticBackend, recorder: Recorder, pcp: int
    ) -> None:
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self._pcp = pcp
        self._made: dict[_Size, _Recording] = {}

    def logits(self, view: RankView, rows_of_pcp: Sequence[int], token_ids: Tensor, positions: Tensor) -> Tensor:
        """Of this rank's rows, fp32 [T, vocab], for a step that is `recordable` and `of_one_kind`."""
        reaches = view.classes[0].kinds
        size = _Size(padded_rows(max(rows_of_pcp)), any(sum(reach.block_rows) for reach in reaches))
        if size not in self._made:
            self._made[size] = _Recording(self._model, self._attention, self._backend, size, len(reaches), self._pcp)
            self._made[size].record(self._recorder)
        return self._made[size].run(view, token_ids, positions)[: len(token_ids)]


class _Recording:
    """One size: rows beyond those of a step write nothing and see nothing."""

    def __init__(
        self, model: Model, attention: Attention, backend: StaticBackend, size: _Size, kinds: int, pcp: int
    ) -> None:
        self._model = model
        self._attention = attention
        self._rows = size.rows
        self._backend = backend
        device = attention.pool.device
        self._token_ids = torch.zeros(size.rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(size.rows, dtype=torch.int64, device=device)
        self._writer: StaticWriter = backend.writer((), size.rows)
        blocks = pcp if size.travels else 1
        self._runs = [[backend.static(size.rows) for _ in range(blocks)] for _ in range(kinds)]
        self._travels = size.travels
        self._view = self._padded(self._runs)
        self._replay: Callable[[], Tensor] = self._compute

    def record(self, recorder: Recorder) -> None:
        """Make the recording; members of a group do so in the same step."""
        self._replay = recorder.record(self._compute)

    def run(self, view: RankView, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocab], which the next run overwrites."""
        count = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions[:count] = positions
        self._writer.refill(view.writes)
        wanted = [self._runs_of(reach) for reach in view.classes[0].kinds]
        filled = [
            static.fill(runs)
            for of_kind, wanted_of_kind in zip(self._runs, wanted, strict=True)
            for static, runs in zip(of_kind, wanted_of_kind, strict=True)
        ]
        if all(filled):
            return self._replay()
        self._backend.begin()  # forget the plans of the last step that was not recorded
        return self._compute_with(self._padded(wanted))  # too scattered for the buffers: the same shapes, unrecorded

    def _runs_of(self, reach: Reach) -> list[Sequence[QueryRun]]:
        return [block.runs for block in reach.blocks] if self._travels else [reach.own]

    def _padded(self, runs: Sequence[Sequence[Sequence[QueryRun]]]) -> ClassView:
        return ClassView(0, self._rows, (), tuple(self._reach(of_kind) for of_kind in runs))

    def _reach(self, runs: Sequence[Sequence[QueryRun]]) -> Reach:
        if self._travels:
            return Reach("gather_q", 0, (), tuple(Block(self._rows, of_block) for of_block in runs), (), ())
        return Reach("local", self._rows, runs[0], (), (), ())

    def _compute(self) -> Tensor:
        return self._compute_with(self._view)

    def _compute_with(self, view: ClassView) -> Tensor:
        model = self._model
        if model.embedding is None or model.head is None:
            raise TypeError("a stage of a pipeline cannot be recorded")
        self._attention.resume((view,), self._writer)
        return model.head(model.layers(model.embedding(self._token_ids), self._positions, self._attention))
