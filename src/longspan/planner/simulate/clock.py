"""The time of a planned step in a simulation.

It owns the conversion of a plan into the chunks of the planner's step model, and decides for how many decode steps one
result is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from longspan.cache.pages import PageTable
from longspan.parallel.grid import Grid
from longspan.plan.plan import Segment, StepPlan, rows_of_pcp
from longspan.planner.step import Chunk, StepTime

_GROWTH = 64  # the time of a decode step is computed again when contexts have grown by 1/64
_MAX_REUSES = 128  # steps that one result is used for


class StepTimer(Protocol):
    """The part of `StepModel` that a simulation uses."""

    def time(self, chunks: Sequence[Chunk], decode_schedule: str, prefill_schedule: str) -> StepTime:
        """The time of one step of all ranks."""


class StepClock:
    """The times of consecutive steps.

    A step in which the same requests decode as in the step before takes as long as that one, until the contexts have
    grown by 1/64.
    """

    def __init__(self, timer: StepTimer, grid: Grid) -> None:
        self.reuses_left = 0  # steps of the same batch that take as long as the last one
        self.seconds = 0.0  # time of the last step
        self._timer, self._grid = timer, grid
        self._batch: tuple[str, ...] = ()

    def step(self, plan: StepPlan, table: Callable[[str], PageTable]) -> float:
        """Seconds of `plan`; `table` returns the page table of a request, with the pages of this step."""
        segments = plan.segments
        prefills = any(segment.prefill for segment in segments)
        batch = () if prefills else tuple(segment.request_id for segment in segments)
        if self.reuses_left and batch == self._batch:
            self.reuses_left -= 1
            return self.seconds
        context = sum(segment.stop for segment in segments) // len(segments)
        self.reuses_left, self._batch = 0 if prefills else min(context // _GROWTH, _MAX_REUSES), batch
        time = self._timer.time(self._chunks(plan, table), plan.decode_schedules[0], plan.prefill_schedules[0])
        self.seconds = time.seconds
        return self.seconds

    def repeat(self, steps: int) -> None:
        """Count `steps` more steps like the last one, at most `reuses_left`."""
        self.reuses_left -= steps

    def _chunks(self, plan: StepPlan, table: Callable[[str], PageTable]) -> list[Chunk]:
        segments_of: dict[str, list[Segment]] = {}
        for segment in plan.segments:
            segments_of.setdefault(segment.request_id, []).append(segment)
        return [self._chunk(segments, table(request_id)) for request_id, segments in segments_of.items()]

    def _chunk(self, segments: Sequence[Segment], table: PageTable) -> Chunk:
        """The chunk of one request, from its segments in position order."""
        start, stop, prefill = segments[0].start, segments[-1].stop, segments[0].prefill
        rows = tuple(rows_of_pcp(segments, self._grid.pcp))
        seen = tuple(table.visible(shard, stop) for shard in range(self._grid.num_shards))
        return Chunk(stop - start, start, rows, seen, prefill)
