"""CUDA graphs of short steps with prompt tokens, or with drafts.

The host needs longer to launch the kernels of such a step one by one than a GPU to compute it, and the first token of a
short prompt waits for both, as do all tokens of a step that verifies drafts. It owns the sizes and the tensors that
these graphs read; a step that fits none is run without a graph. Which step fits follows from the plan alone, so that
all ranks decide alike.

If the plan says that some rows travel, all do: KV is written before attention, so queries find their own tokens too on
the ranks that store them. Else segments read themselves from the cache, if a rank stores all of their tokens. If it
does not, because the ranks of a TP group share pages, segments see nothing but themselves, and read their fresh rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.prepared import PreparedStep
from longspan.attention.refillable import RefillableFreshStep, RefillableLocalStep, RefillableStep, StepSize
from longspan.attention.step_buffer import StepBuffer
from longspan.attention.workload import ExpansionCost
from longspan.engine.rank.recorder import Recorder
from longspan.engine.rank.settled_rows import Carried, RefillableRows, SpreadRows, StepRows, slot_writer
from longspan.engine.setup import EngineSetup
from longspan.models.context import Attend, Model
from longspan.plan.mirror import KnownRequest
from longspan.plan.places import RowPlaces
from longspan.plan.plan import StepPlan, all_travel, rows_of_pcp
from longspan.plan.reach import Place
from longspan.plan.view import RankView, rank_view

SHORT_SIZES = (16, 32, 64, 128)
"""Rows of the graphs. Above them a GPU takes longer than the host."""

_PLACES_OF_ROW = 2  # a step of 1 + K rows of each request has 1 + 2 K places of it


def short_sizes(setup: EngineSetup) -> tuple[int, ...]:
    """The sizes that are recorded of steps with prompt tokens, of the rows of the fullest pcp index."""
    return unexpanded(SHORT_SIZES, setup.attention_shape.expansion) if setup.records_short_steps else ()


def unexpanded(sizes: Sequence[int], *expansions: ExpansionCost) -> tuple[int, ...]:
    """Those of `sizes` in which expanding latents never needs fewer products: a graph reads them as they are."""
    return tuple(rows for rows in sizes if not any(expansion.pays(rows, 1) for expansion in expansions))


@dataclass(frozen=True)
class ShortStep:
    """A step that has a graph, on one rank."""

    # all graphs
    graphs: ShortSteps
    # rows of its graph
    rows: int
    # schedule under which all rows travel; None if none does
    schedule: str | None
    # the rank's share of the step
    view: RankView

    def hidden(self, token_ids: Callable[[], Tensor]) -> Tensor:
        """Hidden states [T, hidden]. `token_ids` gives int64 [T] on the device. The next step overwrites the result."""
        found = self.graphs.graph(self.rows, self.schedule).run(self.view, token_ids)
        if found is None:
            raise RuntimeError("a short step with rows that do not read themselves")
        return found


class ShortSteps:
    """The graphs of all sizes (ascending). One that `record` has not made is recorded in the first step of its size.

    Each is recorded for steps in which nothing travels, and for each of `schedules` under which all rows may. If pages
    are `shared` among the ranks of a TP group, nothing travels only where segments see nothing but themselves. With
    `longest` they are of steps whose segments have so many rows at most, and tiles of attention are chosen for
    these. `then` is recorded behind the layers: it is given the hidden states [rows, hidden]. With `carried` rows are
    found on the device, and a graph has room for twice as many places: see `plan/places.py`.
    """

    def __init__(
        self, model: Model, attention: Attention, backend: RecordableBackend, recorder: Recorder,
        sizes: Sequence[int], longest: int | None = None, then: Callable[[Tensor], None] | None = None,
        carried: Carried | None = None, schedules: Sequence[str] = (), pcp: int = 1, shared: bool = False,
    ) -> None:  # fmt: skip
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self.sizes = tuple(sizes)
        self._schedules = None, *schedules
        self._pcp = pcp  # number of pcp indices
        self._shared = shared
        self.longest = longest
        self._then = then
        self._carried = carried
        self._made: dict[StepSize, ShortGraph] = {}
        self.last: ShortGraph | None = None  # the graph of the step in `hidden`; None if it was not recorded

    def record(self) -> Iterator[int]:
        """Record every size, the largest first, and yield it after each graph."""
        for rows in reversed(self.sizes):
            for schedule in self._schedules:
                with torch.inference_mode():
                    self.graph(rows, schedule)
                yield rows

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self.sizes) * len(self._schedules)

    def step(self, plan: StepPlan, requests: Mapping[str, KnownRequest], place: Place) -> ShortStep | None:
        """A step with prompt tokens on the rank at `place`; None if it has no graph, then it has none on any rank.

        `requests` are all requests by id, with the plan already applied.
        """
        found = self._size_of(plan)
        if found is None:
            return None
        (rows, schedule), attention = found, self._attention
        plan = plan if schedule is None else all_travel(plan, schedule)
        view = rank_view(
            plan, requests, place, attention.windows, attention.moves,
            causal_runs=schedule is not None or not self._shared, through_shards=schedule is not None,
        )  # fmt: skip
        return ShortStep(self, rows, schedule, view)

    def _size_of(self, plan: StepPlan) -> tuple[int, str | None] | None:
        """(rows, schedule) of a step's graph; None if it has none.

        Rows are those of the fullest pcp index: what is exchanged has one shape on all ranks.
        """
        most = max(rows_of_pcp(plan.segments, self._pcp))
        size = next((size for size in self.sizes if size >= most), None)
        if size is None:
            return None
        moving: set[str] = set()
        for segment in plan.segments:
            schedules = plan.prefill_schedules if segment.prefill else plan.decode_schedules
            moving.update(schedules[: segment.num_remote_groups])
        schedule, *others = moving or (None,)
        return None if others or schedule not in self._schedules else (size, schedule)

    def hidden(self, view: RankView, token_ids: Callable[[], Tensor], places: RowPlaces | None = None) -> Tensor | None:
        """Hidden states [T, hidden] of a step of a rank alone. `token_ids` gives int64 [T] on the device.

        Where rows are found on the device `places` are those of the step, and `view` has a row for each of them.

        None if the step has too many rows, or something in it is not local. If it has no room in the graph's buffers,
        it is computed without the graph, in the same shapes. The next step overwrites the result.
        """
        self.last = None
        count = len(view.positions)
        if places is not None:
            count = max(len(places.token_ids), -(-count // _PLACES_OF_ROW))
        rows = next((rows for rows in self.sizes if rows >= count), None)
        runs = (run.length for phase in view.phases for run in phase.groups[0].own)
        if rows is None or (self.longest is not None and max(runs, default=0) > self.longest):
            return None
        graph = self.graph(rows)
        found = graph.run(view, token_ids) if places is None else graph.run_places(view, places)
        self.last = None if found is None else graph
        return found

    def graph(self, rows: int, schedule: str | None = None) -> ShortGraph:
        """The graph of one of the sizes and schedules, recorded now if it has not been."""
        size = StepSize(rows, schedule, self._pcp, self.longest)
        if size not in self._made:
            parts = self._model, self._attention, self._backend
            graph = ShortGraph(parts, size, self._then, self._carried, self._shared)
            graph.record(self._recorder)
            self._made[size] = graph
        return self._made[size]


class ShortGraph:
    """The graph of one size."""

    def __init__(
        self, parts: tuple[Model, Attention, RecordableBackend], size: StepSize,
        then: Callable[[Tensor], None] | None, carried: Carried | None, shared: bool,
    ) -> None:  # fmt: skip
        self._model, self._attention, self._backend = parts
        self.size, self.longest = size.rows, size.longest
        self._then = then
        device = self._attention.pool.device
        self._buffer = StepBuffer(device)
        # where rows are found on the device
        self._settled = None
        if carried is not None:
            self._settled = RefillableRows(self.size, self.size * _PLACES_OF_ROW + 1, carried, self._buffer)
        self._step: RefillableFreshStep | RefillableLocalStep | RefillableStep
        common = self._attention.preparer, self._backend
        if size.schedule is not None:
            self._step = RefillableStep(*common, size, self._attention.pool.slots, self._buffer)
        elif shared:
            self._step = RefillableFreshStep(*common, size.rows, self._buffer)
        else:
            self._step = self.refillable(self._attention, self._backend, self._buffer)
        self.prepared = self._step.prepared  # the attention of the last step
        self._token_ids = torch.zeros(self.size, dtype=torch.int64, device=device)
        self._positions = self._buffer.reserve(self.size, torch.int64)
        # the rows of the last step, at fixed addresses
        self.rows = StepRows(self._token_ids, self._positions.device, torch.zeros_like(self._token_ids))
        if self._settled is not None:
            self.rows = self._settled.rows
        self._replay: Callable[[], Tensor] = self._compute

    def refillable(self, attention: Attention, backend: RecordableBackend, buffer: StepBuffer) -> RefillableLocalStep:
        """The attention of such steps whose rows are all local, in the layers of `attention`."""
        rows = self.size if self._settled is None else self._settled.places
        return RefillableLocalStep(attention.preparer, backend, rows, buffer, self.longest)

    @property
    def recorded(self) -> PreparedStep:
        """The attention that the graph reads: that of the last step, unless it has no room there."""
        return self._step.prepared

    def attend(self, attention: Attention, prepared: PreparedStep) -> Attend:
        """The attention of the last step in the layers of `attention`, which has been prepared for it."""
        if self._settled is None:
            attention.begin(prepared)
            return attention
        places, slots = self._settled.rows.places, self._settled.rows.slots
        prepared = PreparedStep(prepared.phases, slot_writer(attention.ops.backend, slots))
        return SpreadRows(attention, prepared, places, len(slots))

    def record(self, recorder: Recorder) -> None:
        """Record the graph."""
        self._buffer.send()
        self._replay = recorder.record(self._compute)

    def run(self, view: RankView, token_ids: Callable[[], Tensor]) -> Tensor | None:
        """See `ShortSteps.hidden`."""
        count, prepared = len(view.positions), self._step.fill(view)
        if prepared is None:
            return None
        self._token_ids[:count] = token_ids()
        self._positions.host[:count] = view.positions
        return self._run(prepared)[:count]

    def run_places(self, wide: RankView, places: RowPlaces) -> Tensor | None:
        """See `ShortSteps.hidden`."""
        prepared = self._step.fill(wide)
        if self._settled is None or prepared is None:
            return None
        self._settled.fill(places)
        return self._run(prepared)[: len(places.token_ids)]

    def _run(self, prepared: PreparedStep) -> Tensor:
        """Hidden states of all rows of a step whose fields are filled."""
        self.prepared = prepared
        self._buffer.send()
        return self._replay() if prepared is self.recorded else self._compute_with(prepared)

    def _compute(self) -> Tensor:
        return self._compute_with(self.recorded)

    def _compute_with(self, prepared: PreparedStep) -> Tensor:
        model = self._model
        if model.embedding is None:
            raise TypeError("a stage of a pipeline cannot be recorded")
        if self._settled is not None:
            self._settled.settle()
        x = model.embedding(self.rows.token_ids)
        hidden = model.layers(x, self.rows.positions, self.attend(self._attention, prepared))
        if self._then is not None:
            self._then(hidden)
        return hidden
