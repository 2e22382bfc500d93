"""One engine of a simulation: the real scheduler and cache, with computed step times in place of ranks.

It owns the steps in flight and the times of tokens; it must not know about other instances or traces.
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

_ROOT = b""  # root key of the prefix cache; not used, because requests bring their page keys


@dataclass(frozen=True)
class InstanceConfig:
    """Configuration of a simulated engine."""

    grid: Grid
    scheduler: SchedulerConfig
    page_size: int  # tokens
    pages_per_shard: tuple[int, ...]
    timer: StepTimer  # computes the times of steps
    chooser: ScheduleChooser
    windows: tuple[int | None, ...] = (None,)  # window of each layer group, in tokens; None: full attention
    enable_prefix_caching: bool = True
    skip_repeated: bool = True  # whether equal decode steps are advanced at once


@dataclass
class SimulatedCompletion:
    """A request that runs, and the times of its tokens."""

    max_tokens: int  # tokens it generates
    uncached_tokens: int  # tokens of its prompt that were not in the prefix cache when it arrived
    token_times: list[float] = field(default_factory=list)  # seconds of the simulation


class SimulatedInstance:
    """A simulated engine, which `advance` moves forward in time. Times are seconds of the simulation."""

    def __init__(self, config: InstanceConfig) -> None:
        self.cache = CacheManager(config.page_size, config.pages_per_shard, config.enable_prefix_caching)
        self.scheduler = SimulatedScheduler(
            config.scheduler, self.cache, config.grid, config.chooser, _ROOT, config.windows
        )
        self.completions: dict[str, SimulatedCompletion] = {}
        self.queued_prompt_tokens = 0  # uncached tokens of requests that have no token yet
        self.peak_pages = [0] * self.cache.num_shards
        self.steps = 0
        self._clock = StepClock(config.timer, config.grid)
        self._skip_repeated = config.skip_repeated and config.grid.pp == 1
        self._in_flight: deque[tuple[StepPlan, float]] = deque()  # steps and the times at which they end
        self._stages = [0.0] * config.grid.pp  # when each pipeline stage is free
        self._now = 0.0
        self._repeat_end: float | None = None  # end of a step in flight that repeats the last one

    @property
    def running(self) -> int:
        """Number of requests that have not ended, waiting ones included."""
        return len(self.completions)

    def cached_tokens(self, keys: Sequence[Key]) -> int:
        """Tokens of a prompt that are in the prefix cache of this instance."""
        return self.scheduler.cached_pages(keys) * self.cache.page_size

    def used_pages(self) -> tuple[int, ...]:
        """Number of pages of each shard that requests hold."""
        return tuple(map(self.cache.used, range(self.cache.num_shards)))

    def add(
        self, number: int, prompt_tokens: int, max_tokens: int, keys: Sequence[Key], now: float
    ) -> SimulatedCompletion:
        """Queue a request that `Limits.check` has accepted. The instance must have advanced to `now` before."""
        uncached = prompt_tokens - self.cached_tokens(keys)
        self.scheduler.add_keyed(number, prompt_tokens, max_tokens, keys)
        self.completions[str(number)] = completion = SimulatedCompletion(max_tokens, uncached)
        self.queued_prompt_tokens += uncached
        self._now = max(self._now, now)
        return completion

    def advance(self, until: float) -> None:
        """Finish every step that ends by `until`, and start those that start before it."""
        if not self._in_flight and self._repeat_end is None:  # an engine in a step takes no new requests until it ends
            self._begin(until)
        while self._in_flight or self._repeat_end is not None:
            if self._repeat_end is not None:
                if self._repeat_end > until:
                    return
                self._repeat(self._repeat_end, until)
            elif self._in_flight[0][1] > until:
                return
            else:
                plan, self._now = self._in_flight.popleft()
                self._finish(plan)
            self._begin(until)

    def _begin(self, until: float) -> None:
        """Start a step for every free pipeline stage. A step that repeats the last one is not scheduled again."""
        if self._now < until and self._repeatable():
            self._repeat_end = self._now + self._clock.seconds
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
        """When a step that starts now leaves the last stage. A stage computes one step at a time."""
        at = self._now
        for stage, busy_until in enumerate(self._stages):
            at = max(at, busy_until) + seconds / len(self._stages)
            self._stages[stage] = at
        return at

    def _finish(self, plan: StepPlan) -> None:
        """Commit a step: record the times of its tokens, and end finished requests."""
        sampled = tuple(
            SampledToken(segment.request_id, int(segment.request_id))
            for segment in plan.segments
            if segment.sample and segment.request_id in self.completions
        )
        for token in self.scheduler.commit(plan, StepResult(sampled)).tokens:
            completion = self.completions[token.request_id]
            completion.token_times.append(self._now)
            if len(completion.token_times) == 1:
                self.queued_prompt_tokens -= completion.uncached_tokens
            if len(completion.token_times) == completion.max_tokens:
                self.scheduler.finish(token.request_id)
                del self.completions[token.request_id]
                self._clock.reuses_left = 0

    def _repeatable(self) -> int:
        """How many next steps repeat the last one, take as long, and end no request."""
        running = self.scheduler.running
        if not self._skip_repeated or not self._clock.reuses_left or not running:
            return 0
        steps = min(self._clock.reuses_left, self.scheduler.repeatable_steps)
        return min(steps, *(self._left(sequence.request_id) - 1 for sequence in running)) if steps else 0

    def _repeat(self, first_end: float, until: float) -> None:
        """Finish the step in flight, which repeats the last one, and further repetitions that end by `until`."""
        more = self._repeatable() - 1  # -1, so none, if a request has arrived meanwhile
        times = list(accumulate(repeat(self._clock.seconds, more), initial=first_end))
        del times[max(1, bisect_right(times, until)) :]
        for sequence in self.scheduler.running:
            self.completions[sequence.request_id].token_times += times
        self.scheduler.skip(len(times))
        self._clock.repeat(len(times))
        self._now = self._stages[0] = times[-1]
        self.steps += len(times)
        self._repeat_end = None

    def _left(self, request_id: str) -> int:
        """Tokens that a request has yet to generate."""
        completion = self.completions[request_id]
        return completion.max_tokens - len(completion.token_times)
