"""How long a planned step takes: a plan told to the model of cost as chunks.

It owns the translation and how long one answer holds for a decoding batch; the formulas are the planner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from longspan.cache.pages import PageTable
from longspan.parallel.grid import Grid
from longspan.plan.plan import Segment, StepPlan
from longspan.planner.step import Chunk, StepTime

_GROWTH = 64  # a decoding batch is timed anew when its contexts have grown by one part in so many
_MOST_HELD = 128


class StepTimer(Protocol):
    """What a simulation needs of the planner's `StepModel`."""

    def time(self, chunks: Sequence[Chunk], decode_schedule: str, prefill_schedule: str) -> StepTime:
        """One step of the whole engine."""


class StepClock:
    """Seconds of steps, one after the other.

    A step in which the same requests decode as in the one before takes as long as that, until the contexts have
    grown by a part in 64.
    """

    def __init__(self, timer: StepTimer, grid: Grid) -> None:
        self.left = 0
        self.seconds = 0.0
        self._timer, self._grid = timer, grid
        self._batch: tuple[str, ...] = ()

    def step(self, plan: StepPlan, table: Callable[[str], PageTable]) -> float:
        """Seconds of `plan`; `table` gives the page table of a request, the step's pages included."""
        segments = plan.segments
        prefills = any(segment.prefill for segment in segments)
        batch = () if prefills else tuple(segment.request_id for segment in segments)
        if self.left and batch == self._batch:
            self.left -= 1
            return self.seconds
        context = sum(segment.stop for segment in segments) // len(segments)
        self.left, self._batch = 0 if prefills else min(context // _GROWTH, _MOST_HELD), batch
        time = self._timer.time(self._chunks(plan, table), plan.decode_schedules[0], plan.prefill_schedules[0])
        self.seconds = time.seconds
        return self.seconds

    def hold(self, steps: int) -> None:
        """`steps` steps like the last one have gone by, at most `left`."""
        self.left -= steps

    def _chunks(self, plan: StepPlan, table: Callable[[str], PageTable]) -> list[Chunk]:
        segments_of: dict[str, list[Segment]] = {}
        for segment in plan.segments:
            segments_of.setdefault(segment.request_id, []).append(segment)
        return [self._chunk(segments, table(request_id)) for request_id, segments in segments_of.items()]

    def _chunk(self, segments: Sequence[Segment], table: PageTable) -> Chunk:
        """One request's, whose segments are in position order."""
        start, stop, prefill = segments[0].start, segments[-1].stop, segments[0].prefill
        rows = [0] * self._grid.pcp
        for segment in segments:
            rows[segment.pcp] += segment.length
        seen = tuple(table.visible(shard, stop) for shard in range(self._grid.num_shards))
        return Chunk(stop - start, start, tuple(rows), seen, prefill)
