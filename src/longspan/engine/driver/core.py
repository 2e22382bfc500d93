"""The engine's core: completions in, tokens out, one step at a time.

It owns the loop of scheduler and executor and the rules that end a completion by its tokens; it must not know of text,
of users, nor of how its messages travel.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from longspan.cache.manager import CacheManager
from longspan.cache.offload import OffloadCounters
from longspan.config import CostConstants
from longspan.disaggregation.driver import Role
from longspan.engine.driver.executors.base import Executor
from longspan.engine.driver.step_watch import StepWatch
from longspan.engine.rank.page_store import OffloadFiles
from longspan.engine.setup import EngineSetup
from longspan.parallel.collectives import Traffic
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.plan.source import Source
from longspan.request import CoreRequest, FinishReason, PromptScore, SampledToken, TokenOutput
from longspan.scheduler.scheduler import Scheduler, SchedulerCounters

_STEPS_REMEMBERED = 60
_PATIENCE_SECONDS = 0.005


@dataclass(frozen=True)
class StepRecord:
    """One finished step, for reports. `seconds` are from submission to result."""

    step: int
    decode_rows: int
    prefill_tokens: int
    decode_schedule: str
    prefill_schedule: str
    seconds: float


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for reports. Capacity is pages × page size summed over shards."""

    page_size: int
    capacity_tokens: int
    pages_per_shard: tuple[int, ...]
    used_pages_per_shard: tuple[int, ...]
    peak_pages_per_shard: tuple[int, ...]
    prefill_schedule: str
    decode_schedule: str
    scheduler: SchedulerCounters
    traffic: Traffic
    offload: OffloadCounters = field(default_factory=OffloadCounters)


class _Ending:
    """When a completion ends by its tokens."""

    def __init__(self, request: CoreRequest, eos_token_ids: Iterable[int]) -> None:
        params = request.params
        self._stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._left = request.max_tokens - len(request.output_token_ids)

    def take(self, tokens: Sequence[SampledToken]) -> tuple[tuple[SampledToken, ...], FinishReason | None]:
        """Those of the tokens that still belong to it, and why it ended if it did."""
        for count, token in enumerate(tokens, 1):
            self._left -= 1
            if token.token_id in self._stops:
                return tuple(tokens[:count]), FinishReason.STOP
            if self._left == 0:
                return tuple(tokens[:count]), FinishReason.LENGTH
        return tuple(tokens), None


class EngineCore:
    """Continuous batching over an executor, as `build_core` puts it together. Not thread-safe: one caller steps it.

    Raises `EngineError` from `step`.
    """

    def __init__(
        self,
        setup: EngineSetup,
        executor: Executor,
        cache: CacheManager,
        scheduler: Scheduler,
        constants: CostConstants,
        role: Role | None = None,
        offload: OffloadFiles | None = None,
    ) -> None:
        self.setup = setup
        self.executor = executor
        self.cache = cache
        self.scheduler = scheduler
        self.constants = constants
        self.role = role
        self._offload = offload
        self.watch = StepWatch(setup.config.liveness)
        self.recent: deque[StepRecord] = deque(maxlen=_STEPS_REMEMBERED)
        self._under_way: deque[tuple[StepPlan, float, bool]] = deque()
        self._endings: dict[str, _Ending] = {}
        self._schedules = {"prefill": "local", "decode": "local"}
        self._peak = [0] * cache.num_shards
        if role:
            role.start(self, setup.grid.world_size)

    def add(self, request: CoreRequest) -> None:
        """Queue a completion that `Limits.check` has passed."""
        self._endings[request.request_id] = _Ending(request, self.setup.model.eos_token_ids)
        if self.role is None or not self.role.add(request):
            self.begin(request, None)

    def begin(self, request: CoreRequest, source: Source | None) -> None:
        """See `Desk.begin`."""
        self.scheduler.add(request, source)

    def leave(self, request_id: str) -> None:
        """See `Desk.leave`."""
        self.scheduler.finish(request_id)

    def arrived(self, request_id: str) -> None:
        """See `Desk.arrived`."""
        self.scheduler.arrived(request_id)

    def finish(self, request_id: str) -> None:
        """End a completion now; its pages are free for the next step. Unknown ids are ignored."""
        self._endings.pop(request_id, None)
        self.scheduler.finish(request_id)
        if self.role:
            self.role.finish(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has work to do."""
        return bool(self._endings or self._under_way)

    @property
    def steps_in_flight(self) -> int:
        """Steps that were submitted and not yet collected."""
        return len(self._under_way)

    def step(self) -> list[TokenOutput]:
        """Give the ranks as many steps as they work on at once and finish the oldest; returns what that one gave."""
        self.watch.begin()
        try:
            if self.role:
                self.role.exchange()
            while len(self._under_way) < self.scheduler.steps_at_once and (plan := self.scheduler.schedule()):
                self.executor.submit(plan)
                if self.role:
                    self.role.submitted(plan)
                self._under_way.append((plan, time.perf_counter(), not self._under_way))
            if self._under_way:
                self.watch.wait_for(self._under_way[0][0].step, self._tokens_under_way())
                return self._deliver(self.executor.collect(self.watch.check))
            if self.role and self._endings:  # they wait for other instances
                self.role.wait(_PATIENCE_SECONDS)
            return []
        except BaseException:  # an interrupt too: ranks, scheduler and outputs no longer agree on what was computed
            self._under_way.clear()
            self.shutdown()
            raise
        finally:
            self.watch.end()

    def stats(self) -> EngineStats:
        """What is in use and what has travelled so far."""
        return EngineStats(
            page_size=self.cache.page_size,
            capacity_tokens=self.setup.capacity_tokens,
            pages_per_shard=self.setup.pages_per_shard,
            used_pages_per_shard=tuple(self.cache.used(s) for s in range(self.cache.num_shards)),
            peak_pages_per_shard=tuple(self._peak),
            prefill_schedule=self._schedules["prefill"],
            decode_schedule=self._schedules["decode"],
            scheduler=self.scheduler.counters(),
            traffic=self.executor.traffic(),
            offload=self.cache.offload.counters if self.cache.offload else OffloadCounters(),
        )

    def shutdown(self) -> None:
        """End every rank; safe to call again."""
        self.executor.shutdown()
        if self._offload:
            self._offload.close()
        if self.role:
            self.role.close()

    def _tokens_under_way(self) -> int:
        """Those that are computed or loaded in steps in flight."""
        page_size = self.cache.page_size
        return sum(sum(_tokens(plan)) + page_size * len(plan.loads) for plan, _, _ in self._under_way)

    def _deliver(self, result: StepResult) -> list[TokenOutput]:
        """Commit the oldest step in flight."""
        plan, submitted, alone = self._under_way.popleft()
        counted = self.scheduler.commit(plan, result)
        tokens_of: dict[str, list[SampledToken]] = {}
        for token in counted.tokens:
            tokens_of.setdefault(token.request_id, []).append(token)
        scores_of: dict[str, list[PromptScore]] = {}
        for score in counted.prompt_scores:
            scores_of.setdefault(score.request_id, []).append(score)
        seconds = time.perf_counter() - submitted
        self._record(plan, seconds)
        if alone and self.cache.offload:
            self.cache.offload.took(plan.loads, *_tokens(plan), seconds)
        outputs = [
            self._output(each, tokens_of.get(each, ()), scores_of.get(each, ()), counted.errors.get(each))
            for each in dict.fromkeys((*scores_of, *tokens_of, *counted.errors))
        ]
        return [output for output in outputs if output is not None]

    def _output(
        self, request_id: str, tokens: Sequence[SampledToken], scores: Sequence[PromptScore], error: str | None
    ) -> TokenOutput | None:
        """What a step gave one completion; None if that is no user's."""
        cached = self.scheduler.cached_tokens(request_id)
        kept, reason = self._endings[request_id].take(tokens)
        if error is not None:
            reason = FinishReason.ERROR
        output = TokenOutput(request_id, kept, reason, cached, tuple(scores), error)
        if reason is not None and self.role and self.role.keeps(output):
            self._endings.pop(request_id, None)
            self.scheduler.hold(request_id)
            return None
        if reason is not None:
            self.finish(request_id)
        return output

    def _record(self, plan: StepPlan, seconds: float) -> None:
        chunk, rows = _tokens(plan)
        self.watch.measured(chunk + rows, seconds)
        self._schedules["decode"] = plan.decode_schedules[0] if rows else self._schedules["decode"]
        self._schedules["prefill"] = plan.prefill_schedules[0] if chunk else self._schedules["prefill"]
        self.recent.append(
            StepRecord(plan.step, rows, chunk, plan.decode_schedules[0], plan.prefill_schedules[0], seconds)
        )
        for shard in range(self.cache.num_shards):
            self._peak[shard] = max(self._peak[shard], self.cache.used(shard))


def _tokens(plan: StepPlan) -> tuple[int, int]:
    """Tokens a step prefills and decodes."""
    prefilled = sum(segment.length for segment in plan.segments if segment.prefill)
    return prefilled, sum(segment.length for segment in plan.segments) - prefilled
