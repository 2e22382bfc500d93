"""CUDA graphs of decode steps: one for each size of step, recorded before the engine is ready and replayed.

On a CPU a single recording takes their place, which computes as many rows as a step has: see `KernelRecorder`.

It owns the sizes, and the tensors that graphs read and write: token ids, positions and logits. Sampling has graphs of
its own for each number of rows. It must not know how a plan was made. Every decision here follows from the setup and
the plan alone, so all ranks record and replay the same graphs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.prepared import PreparedStep
from longspan.attention.refillable import RefillableStep, StepSize
from longspan.attention.schedules import Schedule
from longspan.attention.step_buffer import StepBuffer
from longspan.config import DEFAULT_RUNNING
from longspan.engine.rank.progress import with_progress
from longspan.engine.rank.recorder import Recorder
from longspan.engine.rank.sampling.recorded import Draw, RecordedDraw
from longspan.engine.rank.short_steps import ShortStep, ShortSteps
from longspan.models.context import Model
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import StepPlan, all_travel
from longspan.plan.reach import Place
from longspan.plan.view import RankView

_SMALL = (1, 2, 4)
# (last size, distance to the next): up to 32 rows padding shows in the time of a step, above it recording shows in the
# time of a start
_STEPS = ((32, 8), (128, 16), (256, 32), (1024, 64))
_LARGE_STEP = 128


def graph_sizes(most: int, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """The sizes that are recorded, ascending; the last is the first with room for `most` rows.

    They are those of `chosen`, if the user has chosen some: then larger steps may remain, which are not recorded.
    """
    if chosen is not None:
        sizes = sorted(set(chosen))
        return tuple(size for number, size in enumerate(sizes) if not number or sizes[number - 1] < most)
    found = [*_SMALL]
    while found[-1] < most:
        step = next((step for last, step in _STEPS if found[-1] < last), _LARGE_STEP)
        found.append((found[-1] // step + 1) * step)
    return tuple(size for number, size in enumerate(found) if not number or found[number - 1] < most)


ALL_SIZES = graph_sizes(DEFAULT_RUNNING)
"""The sizes of an engine with the default number of running requests."""


def padded_rows(rows: int, sizes: Sequence[int] = ALL_SIZES) -> int | None:
    """The smallest of `sizes` (ascending) that has room for `rows` rows; None if none has."""
    place = bisect_left(sizes, rows)
    return sizes[place] if place < len(sizes) else None


def recordable(plan: StepPlan, schedules: Mapping[str, Schedule], sends: bool = True) -> bool:
    """Whether a step only decodes, one token of each request, with schedules whose shapes are fixed.

    Without `sends` only if nothing is sent between ranks.
    """
    for segment in plan.segments:  # a plain loop, because there are hundreds
        if segment.prefill or segment.sample != 1 or len(segment.token_ids) + segment.pending != 1:
            return False
    chosen = [schedules[name] for name in plan.decode_schedules]
    fixed = all(one.recordable and (sends or one.moves in (None, "signals")) for one in chosen)
    return bool(plan.segments) and fixed and len(_moving(plan, schedules)) <= 1


def uniform(plan: StepPlan, schedules: Mapping[str, Schedule]) -> StepPlan:
    """The same step, in which every row travels if any row does.

    Otherwise the shapes of a graph would depend on the number of rows that stay on their own rank.
    """
    schedule = travelling(plan, schedules)
    return plan if schedule is None else all_travel(plan, schedule)


def travelling(plan: StepPlan, schedules: Mapping[str, Schedule]) -> str | None:
    """The schedule under which all rows of the uniform step travel; None if none does."""
    if not any(segment.num_remote_groups for segment in plan.segments):
        return None
    (schedule,) = _moving(plan, schedules)
    return schedule


def _moving(plan: StepPlan, schedules: Mapping[str, Schedule]) -> set[str]:
    """The decode schedules of the plan that send anything."""
    return {name for name in plan.decode_schedules if schedules[name].moves is not None}


class _LogitsBuffer:
    """One tensor for the logits of all graphs, because no two of them run at the same time."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._whole: Tensor | None = None

    def first(self, rows: int) -> Tensor:
        """The first rows of the buffer, [rows, vocab]. Something must have been stored."""
        if self._whole is None:
            raise RuntimeError("no logits have been stored")
        return self._whole[:rows]

    def store(self, logits: Tensor) -> Tensor:
        """Copy logits [T, vocab] to the first rows of the buffer, and return these.

        If the first logits have as many rows as the buffer, they become the buffer.
        """
        if self._whole is None and len(logits) == self._rows:
            self._whole = logits
            return logits
        if self._whole is None:
            self._whole = logits.new_empty(self._rows, logits.shape[1])
        return self._whole[: len(logits)].copy_(logits)


class GraphRunner:
    """All graphs of one rank, of `sizes` rows (ascending).

    A graph that `record` has not made is recorded in the first step of its size.
    """

    def __init__(
        self, model: Model, attention: Attention, backend: RecordableBackend, recorder: Recorder, pcp: int,
        sizes: Sequence[int] = ALL_SIZES, short: ShortSteps | None = None, draw: Draw | None = None, sends: bool = True,
    ) -> None:  # fmt: skip
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self._pcp = pcp
        self.sizes = tuple(sizes)
        self.short = short  # graphs of short steps with prompt tokens; None if they are not recorded
        self._logits = _LogitsBuffer(self.sizes[-1])
        self._made: dict[StepSize, _Graph] = {}
        self.sends = sends  # whether what is recorded may send tensors between ranks
        self._draw = draw  # draws tokens from logits; None if this is not recorded
        self._draws: dict[int, RecordedDraw] = {}  # by rows

    @property
    def recorded(self) -> tuple[StepSize, ...]:
        """What has been recorded, in this order."""
        return tuple(self._made)

    def record(self, schedules: Sequence[str | None], shown: bool = False) -> None:
        """Record every size with each of the `schedules`; None stands for steps whose rows are all local.

        The largest size comes first, so that the others find its memory in the pool that all graphs share. All ranks
        must call this at the same time. With `shown` there is a progress bar.
        """
        count = len(self.sizes) * len(schedules)
        for _ in with_progress("recording decode steps", self.record_one_by_one(schedules), count, shown):
            pass
        if self.short is not None:
            for _ in with_progress("recording short steps", self.short.record(), self.short.count, shown):
                pass

    def record_one_by_one(self, schedules: Sequence[str | None]) -> Iterator[StepSize]:
        """Record as `record` does, and yield after each graph."""
        for rows in reversed(self.sizes):
            for name in schedules:
                with torch.inference_mode():
                    self._graph(size := StepSize(rows, name, self._pcp))
                yield size

    def short_step(self, plan: StepPlan, requests: Mapping[str, KnownRequest], place: Place) -> ShortStep | None:
        """See `ShortSteps.step`; None if short steps are not recorded."""
        return None if self.short is None else self.short.step(plan, requests, place)

    @contextmanager
    def without_short(self) -> Iterator[None]:
        """Run short steps without their graphs meanwhile."""
        self.short, short = None, self.short
        try:
            yield
        finally:
            self.short = short

    def has_room(self, rows_of_pcp: Sequence[int]) -> bool:
        """Whether some size has room for the rows of every pcp index of a decode step."""
        return padded_rows(max(rows_of_pcp), self.sizes) is not None

    def logits(self, view: RankView, rows_of_pcp: Sequence[int], token_ids: Tensor) -> Tensor:
        """Logits [T, vocab] of this rank's rows, in a step that is `recordable` and `uniform`.

        `token_ids` are int64 [T], on the device. `rows_of_pcp` has the rows of every pcp index: the largest of them
        decides the size on all ranks. The next step overwrites the result.
        """
        moving = {reach.schedule for reach in view.phases[0].groups if sum(reach.block_rows)}
        rows = padded_rows(max(rows_of_pcp), self.sizes)
        if rows is None:
            raise ValueError(f"{max(rows_of_pcp)} rows, and the largest graph has {self.sizes[-1]}")
        graph = self._graph(StepSize(rows, next(iter(moving), None), self._pcp))
        return graph.run(view, token_ids)[: len(token_ids)]

    def recorded_draw(self, rows_of_pcp: Sequence[int]) -> RecordedDraw | None:
        """What draws tokens from the `logits` of a step with these rows; None if this is not recorded."""
        return self._draws.get(padded_rows(max(rows_of_pcp), self.sizes) or 0)

    def _graph(self, size: StepSize) -> _Graph:
        """The graph of a size, recorded now if it has not been."""
        if size not in self._made:
            pool, buffer = self._attention.pool, StepBuffer(self._attention.pool.device)
            in_place = bool(pool.mapped)
            step = RefillableStep(self._attention.preparer, self._backend, size, pool.slots, buffer, in_place)
            graph = _Graph(self._model, self._attention, step, size.rows, buffer, self._logits)
            graph.record(self._recorder)
            self._made[size] = graph
            if self._draw is not None and size.rows not in self._draws:
                self._draws[size.rows] = RecordedDraw(self._logits.first(size.rows), self._draw, self._recorder)
        return self._made[size]


class _Graph:
    """The graph of one size of step."""

    def __init__(
        self,
        model: Model,
        attention: Attention,
        step: RefillableStep,
        rows: int,
        buffer: StepBuffer,
        logits: _LogitsBuffer,
    ) -> None:
        self._model = model
        self._attention = attention
        self._step = step
        self._buffer = buffer
        self._logits = logits
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=attention.pool.device)
        self._positions = buffer.reserve(rows, torch.int64)
        self._rows = buffer.reserve(1, torch.int64)
        self._replay: Callable[[], Tensor] = self._compute

    def record(self, recorder: Recorder) -> None:
        """Record the graph. All members of a group must do so in the same step."""
        self._replay = recorder.record(self._compute, self._rows.device)

    def run(self, view: RankView, token_ids: Tensor) -> Tensor:
        """Logits [rows, vocab] for int64 [T] ids, T <= rows. The next run overwrites them.

        A step whose contexts do not fit the graph's buffers is computed without the graph, in the same shapes.
        """
        count = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions.host[:count] = view.positions
        self._rows.host[0] = count
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
        hidden = model.layers(model.embedding(self._token_ids), self._positions.device, self._attention)
        return self._logits.store(model.head(hidden))
