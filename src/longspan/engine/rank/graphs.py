"""Decode steps of fixed size, recorded once and replayed: a CUDA graph in place of Python between the kernels.

It owns the sizes, and the tokens and positions a recording reads; it must not know what a plan decides, nor where rows
live. Every choice here follows from what all ranks know alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.prepared import PreparedStep
from longspan.attention.refillable import RefillableStep, StepSize
from longspan.attention.schedules import Schedule
from longspan.models.context import Model
from longspan.plan.plan import StepPlan
from longspan.plan.view import RankView

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


def recordable(plan: StepPlan, schedules: Mapping[str, Schedule]) -> bool:
    """Whether a step is one token of each of some decoding requests, by schedules of fixed shape."""
    plain = all(not s.prefill and s.length == 1 and s.sample == 1 for s in plan.segments)
    fixed = all(schedules[name].recordable for name in plan.decode_schedules)
    return bool(plan.segments) and plain and fixed and len(_moving(plan, schedules)) <= 1


def uniform(plan: StepPlan, schedules: Mapping[str, Schedule]) -> StepPlan:
    """The same step with all rows travelling if any does: how many stay at home must not change a recording's shape."""
    groups = len(plan.decode_schedules)
    if not any(segment.num_remote_groups for segment in plan.segments):
        return plan
    segments = tuple(replace(segment, num_remote_groups=groups) for segment in plan.segments)
    (schedule,) = _moving(plan, schedules)
    return replace(plan, segments=segments, decode_schedules=(schedule,) * groups)


def _moving(plan: StepPlan, schedules: Mapping[str, Schedule]) -> set[str]:
    """Schedules of the decoding rows under which something travels."""
    return {name for name in plan.decode_schedules if schedules[name].moves is not None}


class GraphRunner:
    """All recordings of one rank, made when a size is first met."""

    def __init__(
        self, model: Model, attention: Attention, backend: RecordableBackend, recorder: Recorder, pcp: int
    ) -> None:
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self._pcp = pcp
        self._made: dict[StepSize, _Graph] = {}

    def logits(self, view: RankView, rows_of_pcp: Sequence[int], token_ids: Tensor, positions: Tensor) -> Tensor:
        """Of this rank's rows, fp32 [T, vocab], for a step that is `recordable` and `uniform`."""
        moving = {reach.schedule for reach in view.phases[0].groups if sum(reach.block_rows)}
        size = StepSize(padded_rows(max(rows_of_pcp)), next(iter(moving), None), self._pcp)
        if size not in self._made:
            step = RefillableStep(self._attention.preparer, self._backend, size)
            self._made[size] = _Graph(self._model, self._attention, step, size.rows)
            self._made[size].record(self._recorder)
        return self._made[size].run(view, token_ids, positions)[: len(token_ids)]


class _Graph:
    """One size."""

    def __init__(self, model: Model, attention: Attention, step: RefillableStep, rows: int) -> None:
        self._model = model
        self._attention = attention
        self._step = step
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=attention.pool.device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=attention.pool.device)
        self._replay: Callable[[], Tensor] = self._compute

    def record(self, recorder: Recorder) -> None:
        """Make the recording; members of a group do so in the same step."""
        self._replay = recorder.record(self._compute)

    def run(self, view: RankView, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocab], which the next run overwrites."""
        count = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions[:count] = positions
        prepared = self._step.fill(view)
        return self._replay() if prepared is self._step.prepared else self._compute_with(prepared)

    def _compute(self) -> Tensor:
        return self._compute_with(self._step.prepared)

    def _compute_with(self, prepared: PreparedStep) -> Tensor:
        model = self._model
        if model.embedding is None or model.head is None:
            raise TypeError("a stage of a pipeline cannot be recorded")
        self._attention.begin(prepared)
        return model.head(model.layers(model.embedding(self._token_ids), self._positions, self._attention))
