"""One engine of a simulation: the real scheduler and cache, a clock in place of the ranks.

It owns the steps in flight and what they give; it must not know of other instances nor of a trace.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat

from longspan.attention.cost import ScheduleChooser
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import Key
from longspan.config import SchedulerConfig
from longspan.parallel.grid import Grid
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.planner.simulate.clock import StepClock, StepTimer
from longspan.planner.simulate.scheduler import SimulatedScheduler
from longspan.request import SampledToken

_ROOT = b""  # page keys are given


@dataclass(frozen=True)
class InstanceConfig:
    """What one engine is: its ranks, pages, batching and the time its steps take.

    With `skips` steps that must be alike are made at once.
    """

    grid: Grid
    scheduler: SchedulerConfig
    page_size: int
    pages_per_shard: tuple[int, ...]
    timer: StepTimer
    chooser: ScheduleChooser
    windows: tuple[int | None, ...] = (None,)
    enable_prefix_caching: bool = True
    skips: bool = True


@dataclass
class Completion:
    """One request on its way: the seconds at which its tokens came, of `max_tokens`."""

    max_tokens: int
    ahead: int
    token_times: list[float] = field(default_factory=list)


class Instance:
    """An engine that is told until when to go on. Times are seconds of the simulation."""

    def __init__(self, config: InstanceConfig) -> None:
        self.cache = CacheManager(config.page_size, config.pages_per_shard, config.enable_prefix_caching)
        self.scheduler = SimulatedScheduler(
            config.scheduler, self.cache, config.grid, config.chooser, _ROOT, config.windows
        )
        self.completions: dict[str, Completion] = {}
        self.prompt_tokens_ahead = 0
        self.peak_pages = [0] * self.cache.num_shards
        self.steps = 0
        self._clock = StepClock(config.timer, config.grid)
        self._skips = config.skips and config.grid.pp == 1
        self._in_flight: deque[tuple[StepPlan, float]] = deque()
        self._stages = [0.0] * config.grid.pp
        self._now = 0.0
        self._alike_end: float | None = None

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self.completions)

    def cached_tokens(self, keys: Sequence[Key]) -> int:
        """Tokens of a prompt that need not be computed here."""
        return self.scheduler.cached_pages(keys) * self.cache.page_size

    def used_pages(self) -> tuple[int, ...]:
        """Pages that requests hold, of each shard."""
        return tuple(map(self.cache.used, range(self.cache.num_shards)))

    def add(self, number: int, prompt_tokens: int, max_tokens: int, keys: Sequence[Key], now: float) -> Completion:
        """Queue a request that `Limits.check` has passed, at `now`; the instance has advanced to there."""
        ahead = prompt_tokens - self.cached_tokens(keys)
        self.scheduler.add_keyed(number, prompt_tokens, max_tokens, keys)
        self.completions[str(number)] = completion = Completion(max_tokens, ahead)
        self.prompt_tokens_ahead += ahead
        self._now = max(self._now, now)
        return completion

    def advance(self, until: float) -> None:
        """Do every step that ends by `until` and begin those that begin before."""
        if not self._in_flight and self._alike_end is None:  # else the engine waits for a step and hears of nobody
            self._begin(until)
        while self._in_flight or self._alike_end is not None:
            if self._alike_end is not None:
                if self._alike_end > until:
                    return
                self._repeat(self._alike_end, until)
            elif self._in_flight[0][1] > until:
                return
            else:
                plan, self._now = self._in_flight.popleft()
                self._finish(plan)
            self._begin(until)

    def _begin(self, until: float) -> None:
        """Give every pipeline stage a step; one like the last is not planned again."""
        if self._now < until and self._alike():
            self._alike_end = self._now + self._clock.seconds
            return
        while self._now < until and len(self._in_flight) < len(self._stages):
            plan = self.scheduler.schedule()
            if plan is None:
                return
            self.steps += 1
            self._in_flight.append((plan, self._end(self._clock.step(plan, self.scheduler.table))))
            for shard, used in enumerate(self.used_pages()):
                self.peak_pages[shard] = max(self.peak_pages[shard], used)

    def _end(self, seconds: float) -> float:
        """When a step that begins now has left the last stage: each takes one step at a time."""
        at = self._now
        for stage, busy_until in enumerate(self._stages):
            at = max(at, busy_until) + seconds / len(self._stages)
            self._stages[stage] = at
        return at

    def _finish(self, plan: StepPlan) -> None:
        sampled = tuple(
            SampledToken(segment.request_id, int(segment.request_id))
            for segment in plan.segments
            if segment.sample and segment.request_id in self.completions
        )
        for token in self.scheduler.commit(plan, StepResult(sampled)).tokens:
            completion = self.completions[token.request_id]
            completion.token_times.append(self._now)
            if len(completion.token_times) == 1:
                self.prompt_tokens_ahead -= completion.ahead
            if len(completion.token_times) == completion.max_tokens:
                self.scheduler.finish(token.request_id)
                del self.completions[token.request_id]
                self._clock.left = 0

    def _alike(self) -> int:
        """How many next steps do what the last one did, take as long, and end no request."""
        running = self.scheduler.running
        if not self._skips or not self._clock.left or not running:
            return 0
        steps = min(self._clock.left, self.scheduler.steps_alike)
        return min(steps, *(self._left(sequence.request_id) - 1 for sequence in running)) if steps else 0

    def _repeat(self, first_end: float, until: float) -> None:
        """End the step in flight, which is like the last one, and as many behind it as end by `until`."""
        behind = self._alike() - 1  # none if somebody has come meanwhile
        times = list(accumulate(repeat(self._clock.seconds, behind), initial=first_end))
        del times[max(1, bisect_right(times, until)) :]
        for sequence in self.scheduler.running:
            self.completions[sequence.request_id].token_times += times
        self.scheduler.skip(len(times))
        self._clock.hold(len(times))
        self._now = self._stages[0] = times[-1]
        self.steps += len(times)
        self._alike_end = None

    def _left(self, request_id: str) -> int:
        completion = self.completions[request_id]
        return completion.max_tokens - len(completion.token_times)
