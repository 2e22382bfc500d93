"""The attention of a step with a fixed number of rows, which is refilled before a CUDA graph is replayed.

It owns which runs and slots are refilled from a view; the buffers are the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from longspan.attention.backends.base import PreparedRuns, RecordableBackend, RefillableRuns
from longspan.attention.prepared import DiagonalRows, OwnRuns, PreparedPhase, PreparedReach, PreparedStep, Preparer
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.step_buffer import StepBuffer
from longspan.cache.pages import Span
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryBlock, QueryRun, Reach
from longspan.plan.view import PhaseView, RankView

_SHORT_SPAN_SLOTS = 1 << 18  # slots of short spans for which a local step has room


@dataclass(frozen=True)
class StepSize:
    """What uniform steps that share a CUDA graph have in common."""

    # rows of each pcp index, padded
    rows: int
    # schedule under which all rows travel; None if all rows are local
    schedule: str | None
    # number of pcp indices
    pcp: int
    # rows of the longest segment, for which tiles are chosen; None if all rows may be of one
    longest: int | None = 1


class RefillableStep:
    """A prepared step in which all rows are local or all travel, whose runs and slots can be replaced in place.

    Rows that pad a step write nothing and see nothing. `slots` is the number of slots of the pool. With `in_place`
    local rows may see the slots of other ranks too. Raises `ValueError` for segments of several rows if the backend has
    no such runs.
    """

    def __init__(
        self, preparer: Preparer, backend: RecordableBackend, size: StepSize, slots: int, buffer: StepBuffer,
        in_place: bool = False,
    ) -> None:  # fmt: skip
        self._preparer = preparer
        self._in_place = in_place
        self._size = size
        blocks = 1 if size.schedule is None else size.pcp
        self._runs = [[_refillable(backend, size, slots, buffer) for _ in range(blocks)] for _ in preparer.windows]
        self._writer = backend.writer((), size.rows, buffer)
        reach = self._reach([()] * blocks)
        groups = tuple(
            PreparedReach(reach, OwnRuns(runs[0]), (), preparer)
            if size.schedule is None
            else PreparedReach(reach, None, tuple(runs), preparer)
            for runs in self._runs
        )
        self.prepared = PreparedStep((PreparedPhase(0, size.rows, groups),), self._writer)

    def fill(self, view: RankView) -> PreparedStep:
        """Refill `prepared` for this step, and return it. The caller sends the buffer.

        If the runs have too many spans for the buffers, returns a step of the same shapes that is prepared anew, which
        must be run without the CUDA graph. Ranks may differ in this.
        """
        self._writer.refill(view.writes)
        wanted = [self._runs_of(group) for group in zip(*(phase.groups for phase in view.phases), strict=True)]
        filled = [
            refillable.fill(runs)
            for of_group, wanted_of_kind in zip(self._runs, wanted, strict=True)
            for refillable, runs in zip(of_group, wanted_of_kind, strict=True)
        ]
        if all(filled):
            return self.prepared
        padded = PhaseView(0, self._size.rows, (), tuple(self._reach(of_group) for of_group in wanted))
        return PreparedStep((self._preparer.rows(padded),), self._writer)

    def _runs_of(self, phases: Sequence[Reach]) -> list[Sequence[QueryRun]]:
        """The runs of each block in all phases: of each pcp index if rows travel, else of the local rows only."""
        if self._size.schedule is None:
            return [_joined([(reach.travel, reach.own) for reach in phases])]
        blocks = zip(*(reach.blocks for reach in phases), strict=True)
        return [_joined([(block.rows, block.runs) for block in of_pcp]) for of_pcp in blocks]

    def _reach(self, runs: Sequence[Sequence[QueryRun]]) -> Reach:
        """A reach of padded rows, from the runs of each block."""
        rows, schedule = self._size.rows, self._size.schedule
        if schedule is None:
            return Reach("local", rows, runs[0], (), (), (), self._in_place)
        return Reach(schedule, 0, (), tuple(QueryBlock(rows, of_block) for of_block in runs), (), ())


def _refillable(backend: RecordableBackend, size: StepSize, slots: int, buffer: StepBuffer) -> RefillableRuns:
    """Runs of a step of this size."""
    if size.longest == 1:
        return backend.refillable(size.rows, slots, buffer)
    return _of_several_rows(backend, size.rows, size.longest or size.rows)


def _of_several_rows(
    backend: RecordableBackend, rows: int, longest: int, index: int = _SHORT_SPAN_SLOTS
) -> RefillableRuns:
    """Runs of up to `longest` rows. Raises `ValueError` if the backend has none."""
    found = backend.indexed(rows, longest, index)
    if found is None:
        raise ValueError(f"{type(backend).__name__} has no refillable runs of several rows")
    return found


def _joined(phases: Sequence[tuple[int, Sequence[QueryRun]]]) -> Sequence[QueryRun]:
    """The runs of all phases, each (rows, runs), with rows counted from the first phase's first row."""
    if len(phases) == 1:
        return phases[0][1]  # as it is: runs of decode rows are more than a list
    firsts = accumulate((rows for rows, _ in phases), initial=0)
    return [replace(run, row=run.row + first) for first, (_, runs) in zip(firsts, phases, strict=False) for run in runs]


class RefillableLocalRuns:
    """Runs of several rows in each layer group, on a rank that computes alone, which can be replaced in place.

    Rows of no run see nothing. `longest` is the number of rows of the longest run, for which tiles are chosen. Raises
    `ValueError` if the backend has no such runs.
    """

    def __init__(self, preparer: Preparer, backend: RecordableBackend, rows: int, longest: int) -> None:
        self._runs = [_of_several_rows(backend, rows, longest) for _ in preparer.windows]
        self.phase = local_phase(preparer, rows, self._runs)

    def fill(self, wanted: Sequence[Sequence[QueryRun]]) -> bool:
        """Replace the runs of each layer group. False if they do not fit: then they must be prepared anew."""
        return all(made.fill(runs) for made, runs in zip(self._runs, wanted, strict=True))


class RefillableLocalStep:
    """A prepared step of any segments whose rows are all local, of which runs and slots can be replaced in place.

    Rows that pad a step write nothing and see nothing. `longest` and errors are as in `RefillableLocalRuns`.
    """

    def __init__(
        self, preparer: Preparer, backend: RecordableBackend, rows: int, buffer: StepBuffer, longest: int | None = None
    ) -> None:
        self._preparer, self._rows = preparer, rows
        self._runs = RefillableLocalRuns(preparer, backend, rows, longest or rows)
        self._slots = backend.writer((), rows, buffer)
        self.prepared = PreparedStep((self._runs.phase,), self._slots)

    def fill(self, view: RankView) -> PreparedStep | None:
        """Refill `prepared` for this step, and return it. The caller sends the buffer.

        None if rows travel, or a segment does not read itself from the cache: all ranks of a TP group find the same. If
        the runs do not fit into the buffers, in which ranks may differ, returns a step of the same shapes that is
        prepared anew, which must be run without the CUDA graph.
        """
        if any(phase.diagonal or any(sum(reach.block_rows) for reach in phase.groups) for phase in view.phases):
            return None
        groups = zip(*(phase.groups for phase in view.phases), strict=True)
        wanted = [_joined([(reach.travel, reach.own) for reach in group]) for group in groups]
        self._slots.refill(view.writes)
        if self._runs.fill(wanted):
            return self.prepared
        groups_anew = tuple(Reach("local", self._rows, runs, (), (), ()) for runs in wanted)
        return PreparedStep((self._preparer.rows(PhaseView(0, self._rows, (), groups_anew)),), self._slots)


class RefillableFreshStep:
    """A prepared step whose segments see nothing but themselves, which can be replaced in place.

    They attend to keys and values as these are computed: where ranks share the pages of a context, a rank does not
    store all tokens of its segments. Rows that pad a step write nothing and see nothing. Errors are as in
    `RefillableLocalRuns`.
    """

    def __init__(self, preparer: Preparer, backend: RecordableBackend, rows: int, buffer: StepBuffer) -> None:
        self._preparer, self._rows = preparer, rows
        self._runs = [_of_several_rows(backend, rows, rows, index=0) for _ in preparer.windows]
        self._slots = backend.writer((), rows, buffer)
        diagonals = [DiagonalRows(0, rows, expanded=False, prepared=_FreshRuns(runs)) for runs in self._runs]
        groups = tuple(PreparedReach(self._reach, None, (), preparer, (diagonal,)) for diagonal in diagonals)
        self.prepared = PreparedStep((PreparedPhase(0, rows, groups),), self._slots)

    def fill(self, view: RankView) -> PreparedStep:
        """See `RefillableStep.fill`. The view has one phase, and all segments have diagonals."""
        (segments,) = (phase.diagonal for phase in view.phases)
        wanted = [[_fresh_run(*segment, window) for segment in segments] for window in self._preparer.windows]
        self._slots.refill(view.writes)
        if all(runs.fill(some) for runs, some in zip(self._runs, wanted, strict=True)):
            return self.prepared
        padded = PhaseView(0, self._rows, segments, (self._reach,) * len(wanted))
        return PreparedStep((self._preparer.rows(padded),), self._slots)

    @property
    def _reach(self) -> Reach:
        return Reach("local", self._rows, (), (), (), ())


@dataclass(frozen=True)
class _FreshRuns:
    """The diagonal of segments as causal runs over the rows' own keys and values, as if these were cached."""

    # the runs; slots are rows
    runs: RefillableRuns

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, blocks: Sequence[HeadBlock], scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:  # fmt: skip
        """See `PreparedDiagonal.attend`."""
        rows = torch.stack([k] if v is None else [k, v]).transpose(1, 2)
        return self.runs.attend(q, CacheRows(rows), blocks, scale, dtype)


def _fresh_run(row: int, length: int, window: int | None) -> QueryRun:
    """What a segment of `length` rows sees of itself in layers with this window."""
    starts = None if window is None else tuple(max(0, seen + 1 - window) for seen in range(length))
    return QueryRun(row, length, (Span(row, length),), starts, causal=True)


def local_phase(preparer: Preparer, rows: int, runs: Sequence[PreparedRuns]) -> PreparedPhase:
    """A phase of `rows` rows that are all local, with prepared runs for each layer group."""
    reach = Reach("local", rows, (), (), (), ())
    return PreparedPhase(0, rows, tuple(PreparedReach(reach, OwnRuns(each), (), preparer) for each in runs))
