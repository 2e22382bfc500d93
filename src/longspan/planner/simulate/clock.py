"""How long a planned step takes: a plan told to the model of cost as chunks.

It owns the translation and how long one answer holds for a decoding batch; the formulas are the planner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from longspan.cache.pages import PageTable
from longspan.parallel.grid import Grid
from longspan.plan.plan import StepPlan
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
        rows: dict[str, list[int]] = {}
        begins: dict[str, int] = {}
        stops: dict[str, int] = {}
        prefill: dict[str, bool] = {}
        for segment in plan.segments:
            request_id = segment.request_id
            if request_id not in rows:
                rows[request_id] = [0] * self._grid.pcp
                begins[request_id], prefill[request_id] = segment.start, segment.prefill
            rows[request_id][segment.pcp] += segment.length
            stops[request_id] = segment.stop
        shards = range(self._grid.num_shards)
        return [
            Chunk(
                new_tokens=stops[request_id] - begin,
                cached_tokens=begin,
                rows_by_pcp=tuple(rows[request_id]),
                tokens_by_shard=tuple(table(request_id).visible(shard, stops[request_id]) for shard in shards),
                prefill=prefill[request_id],
            )
            for request_id, begin in begins.items()
        ]
