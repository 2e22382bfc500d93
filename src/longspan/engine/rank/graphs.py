"""CUDA graphs of decode steps: one for each size of step, recorded once and replayed.

It owns the sizes, and the token ids and positions that a graph reads; it must not know how a plan was made.
Every decision here follows from the plan alone, so all ranks record and replay the same graphs in the same steps.
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
from longspan.attention.step_buffer import StepBuffer
from longspan.models.context import Model
from longspan.plan.plan import StepPlan
from longspan.plan.view import RankView

_STEP = 8  # larger sizes are multiples of this
_SMALL = (1, 2, 4)


class Recorder(Protocol):
    """Records work whose inputs and results keep their addresses."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run the work once and record it. The returned function repeats it on the present contents of its inputs."""
        ...


class EagerRecorder:
    """The reference: runs the work again without a graph. As with a graph, the result keeps its address."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Recorder.record`."""
        result = work()
        return lambda: result.copy_(work())


class CudaRecorder:
    """Records CUDA graphs. They share one memory pool, because no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one for all graphs: cuBLAS keeps a workspace of 32 MiB for each stream

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Recorder.record`. A first run outside the capture compiles kernels and allocates buffers."""
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
    """The smallest size of a graph that has room for `rows` rows."""
    return next((size for size in _SMALL if size >= rows), -(-rows // _STEP) * _STEP)


def recordable(plan: StepPlan, schedules: Mapping[str, Schedule]) -> bool:
    """Whether a step only decodes, one token of each request, with schedules whose shapes are fixed."""
    for segment in plan.segments:  # a plain loop, because there are hundreds
        if segment.prefill or segment.sample != 1 or len(segment.token_ids) + segment.pending != 1:
            return False
    fixed = all(schedules[name].recordable for name in plan.decode_schedules)
    return bool(plan.segments) and fixed and len(_moving(plan, schedules)) <= 1


def uniform(plan: StepPlan, schedules: Mapping[str, Schedule]) -> StepPlan:
    """The same step, in which every row travels if any row does.

    Otherwise the shapes of a graph would depend on the number of rows that stay on their own rank.
    """
    groups, schedule = len(plan.decode_schedules), travelling(plan, schedules)
    if schedule is None:
        return plan
    segments = tuple(replace(segment, num_remote_groups=groups) for segment in plan.segments)
    return replace(plan, segments=segments, decode_schedules=(schedule,) * groups)


def travelling(plan: StepPlan, schedules: Mapping[str, Schedule]) -> str | None:
    """The schedule under which all rows of the uniform step travel; None if none does."""
    if not any(segment.num_remote_groups for segment in plan.segments):
        return None
    (schedule,) = _moving(plan, schedules)
    return schedule


def _moving(plan: StepPlan, schedules: Mapping[str, Schedule]) -> set[str]:
    """The decode schedules of the plan that send anything."""
    return {name for name in plan.decode_schedules if schedules[name].moves is not None}


class GraphRunner:
    """All graphs of one rank. A graph is recorded in the first step of its size."""

    def __init__(
        self, model: Model, attention: Attention, backend: RecordableBackend, recorder: Recorder, pcp: int
    ) -> None:
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self._pcp = pcp
        self._made: dict[StepSize, _Graph] = {}

    def logits(self, view: RankView, rows_of_pcp: Sequence[int], token_ids: Tensor) -> Tensor:
        """Logits fp32 [T, vocab] of this rank's rows, in a step that is `recordable` and `uniform`.

        `token_ids` are int64 [T], on the device. `rows_of_pcp` has the rows of every pcp index: the largest of them
        decides the size on all ranks. The next step overwrites the result.
        """
        moving = {reach.schedule for reach in view.phases[0].groups if sum(reach.block_rows)}
        size = StepSize(padded_rows(max(rows_of_pcp)), next(iter(moving), None), self._pcp)
        if size not in self._made:
            pool, buffer = self._attention.pool, StepBuffer(self._attention.pool.device)
            step = RefillableStep(self._attention.preparer, self._backend, size, pool.slots, buffer)
            self._made[size] = _Graph(self._model, self._attention, step, size.rows, buffer)
            self._made[size].record(self._recorder)
        return self._made[size].run(view, token_ids)[: len(token_ids)]


class _Graph:
    """The graph of one size of step."""

    def __init__(self, model: Model, attention: Attention, step: RefillableStep, rows: int, buffer: StepBuffer) -> None:
        self._model = model
        self._attention = attention
        self._step = step
        self._buffer = buffer
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=attention.pool.device)
        self._positions = buffer.reserve(rows, torch.int64)
        self._replay: Callable[[], Tensor] = self._compute

    def record(self, recorder: Recorder) -> None:
        """Record the graph. All members of a group must do so in the same step."""
        self._replay = recorder.record(self._compute)

    def run(self, view: RankView, token_ids: Tensor) -> Tensor:
        """Logits fp32 [rows, vocab] for int64 [T] ids, T <= rows. The next run overwrites them.

        A step whose contexts do not fit the graph's buffers is computed without the graph, in the same shapes.
        """
        count = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions.host[:count] = view.positions
        prepared = self._step.fill(view)
        self._buffer.send()
        return self._replay() if prepared is self._step.prepared else self._compute_with(prepared)

    def _compute(self) -> Tensor:
        return self._compute_with(self._step.prepared)

    def _compute_with(self, prepared: PreparedStep) -> Tensor:
        model = self._model
        if model.embedding is None or model.head is None:
            raise TypeError("a stage of a pipeline cannot be recorded")
        self._attention.begin(prepared)
        return model.head(model.layers(model.embedding(self._token_ids), self._positions.device, self._attention))
