"""A decode step of a fixed number of rows that can be refilled: what a recorded step attends to.

It owns which runs and slots are refilled from a view; buffers and their addresses are the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.attention.backends.base import RecordableBackend
from longspan.attention.prepared import OwnRuns, PreparedPhase, PreparedReach, PreparedStep, Preparer
from longspan.plan.reach import Block, QueryRun, Reach
from longspan.plan.view import PhaseView, RankView


@dataclass(frozen=True)
class StepSize:
    """What steps that share a recording have in common."""

    # on the pcp index that has most
    rows: int
    # under which they all travel; None: all stay
    schedule: str | None
    # pcp indices
    pcp: int


class RefillableStep:
    """Rows beyond those of a step write nothing and see nothing."""

    def __init__(self, preparer: Preparer, backend: RecordableBackend, size: StepSize) -> None:
        self._preparer = preparer
        self._size = size
        blocks = 1 if size.schedule is None else size.pcp
        self._runs = [[backend.refillable(size.rows) for _ in range(blocks)] for _ in preparer.windows]
        self._writer = backend.writer((), size.rows)
        reach = self._reach([()] * blocks)
        nothing = OwnRuns(backend.prepare((), 0))
        groups = tuple(
            PreparedReach(reach, OwnRuns(runs[0]), (), (), preparer)
            if size.schedule is None
            else PreparedReach(reach, nothing, tuple(runs), (), preparer)
            for runs in self._runs
        )
        self.prepared = PreparedStep((PreparedPhase(0, size.rows, groups),), self._writer)

    def fill(self, view: RankView) -> PreparedStep:
        """`prepared`, now for this step; or another of the same shapes if the runs are too scattered for the buffers.

        Which of the two may differ between ranks.
        """
        self._writer.refill(view.writes)
        wanted = [self._runs_of(reach) for reach in view.phases[0].groups]
        filled = [
            refillable.fill(runs)
            for of_group, wanted_of_kind in zip(self._runs, wanted, strict=True)
            for refillable, runs in zip(of_group, wanted_of_kind, strict=True)
        ]
        if all(filled):
            return self.prepared
        padded = PhaseView(0, self._size.rows, (), tuple(self._reach(of_group) for of_group in wanted))
        return PreparedStep((self._preparer.rows(padded),), self._writer)

    def _runs_of(self, reach: Reach) -> list[Sequence[QueryRun]]:
        return [reach.own] if self._size.schedule is None else [block.runs for block in reach.blocks]

    def _reach(self, runs: Sequence[Sequence[QueryRun]]) -> Reach:
        rows, schedule = self._size.rows, self._size.schedule
        if schedule is None:
            return Reach("local", rows, runs[0], (), (), ())
        return Reach(schedule, 0, (), tuple(Block(rows, of_block) for of_block in runs), (), ())
