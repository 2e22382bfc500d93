"""The engine core: takes completions and returns their tokens, one step at a time.

It owns the loop over scheduler and executor, and the rules that end a completion by its tokens. It must not know about
text, users' requests, or how messages arrive.
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
from longspan.scheduler.counters import SchedulerCounters
from longspan.scheduler.scheduler import Scheduler

_STEPS_REMEMBERED = 60
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class StepRecord:
    """One finished step, for reports."""

    # the step's number
    step: int
    # decode tokens computed
    decode_rows: int
    # prompt tokens computed
    prefill_tokens: int
    # schedule of the decode phase in the widest layer group
    decode_schedule: str
    # schedule of the prefill phase in the widest layer group
    prefill_schedule: str
    # wall-clock time from submission to result
    seconds: float


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine, for reports."""

    # tokens of a page
    page_size: int
    # tokens that the cache holds: pages × page size, summed over shards
    capacity_tokens: int
    # pages of each shard
    pages_per_shard: tuple[int, ...]
    # pages of each shard that requests hold now
    used_pages_per_shard: tuple[int, ...]
    # the most pages of each shard held after any step
    peak_pages_per_shard: tuple[int, ...]
    # schedule of the last step with prefill
    prefill_schedule: str
    # schedule of the last step with decode
    decode_schedule: str
    # requests that wait and run, preemptions, draft tokens
    scheduler: SchedulerCounters
    # bytes and calls of collectives, of all ranks since they started
    traffic: Traffic
    # pages saved to and loaded from host memory and disk; zeros without offload
    offload: OffloadCounters = field(default_factory=OffloadCounters)


@dataclass(frozen=True)
class _StepInFlight:
    """A step that is submitted and not yet committed."""

    # the step
    plan: StepPlan
    # when it was submitted, in `time.perf_counter()`
    submitted: float
    # whether its time is its own: no other step was in flight then, and the caller waits for it at once
    alone: bool
    # prompt tokens that it computes
    prefill_tokens: int
    # decode tokens that it computes
    decode_rows: int
    # whether a request cannot go on before this step's token of it is read
    is_awaited: bool

    @property
    def tokens(self) -> int:
        """Number of tokens that it computes."""
        return self.prefill_tokens + self.decode_rows


class _StopCheck:
    """Decides whether a completion's new tokens end it: a stop token, or `max_tokens`."""

    def __init__(self, request: CoreRequest, eos_token_ids: Iterable[int]) -> None:
        params = request.params
        self._stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._left = request.max_tokens - len(request.output_token_ids)

    def take(self, tokens: Sequence[SampledToken]) -> tuple[tuple[SampledToken, ...], FinishReason | None]:
        """The new tokens up to the one that ends the completion, and the reason. The reason is None if none ends it."""
        for count, token in enumerate(tokens, 1):
            self._left -= 1
            if token.token_id in self._stops:
                return tuple(tokens[:count]), FinishReason.STOP
            if self._left == 0:
                return tuple(tokens[:count]), FinishReason.LENGTH
        return tuple(tokens), None


class EngineCore:
    """Continuous batching over an executor. `build_core` builds it. Not thread-safe: one thread calls all methods."""

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
        self._in_flight: deque[_StepInFlight] = deque()
        self._stop_checks: dict[str, _StopCheck] = {}  # of unfinished completions
        # when each unfinished completion was first scheduled, in `time.monotonic()`
        self._scheduled_at: dict[str, float] = {}
        self._schedules = {"prefill": "local", "decode": "local"}
        self._peak = [0] * cache.num_shards
        # whether steps may wait for tokens although the caller expects steps in flight
        asynchronous, drafts = setup.config.scheduler.async_scheduling, setup.config.scheduler.speculative is not None
        self._submits_early = bool(asynchronous) and (drafts or not scheduler.plans_ahead)
        if role:
            role.start(self, setup.grid.world_size)

    def add(self, request: CoreRequest) -> None:
        """Queue a completion. It must have passed `Limits.check`."""
        self._stop_checks[request.request_id] = _StopCheck(request, self.setup.model.eos_token_ids)
        if self.role is None or not self.role.add(request):
            self.begin(request, None)

    def begin(self, request: CoreRequest, source: Source | None) -> None:
        """See `CoreHandle.begin`."""
        self.scheduler.add(request, source)

    def remove(self, request_id: str) -> None:
        """See `CoreHandle.remove`."""
        self.scheduler.finish(request_id)

    def arrived(self, request_id: str) -> None:
        """See `CoreHandle.arrived`."""
        self.scheduler.arrived(request_id)

    def finish(self, request_id: str) -> None:
        """End a completion now. The next step can use its pages. Unknown ids are ignored."""
        self._forget(request_id)
        self.scheduler.finish(request_id)
        if self.role:
            self.role.finish(request_id)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has work to do."""
        return bool(self._stop_checks or self._in_flight)

    @property
    def steps_in_flight(self) -> int:
        """Number of steps submitted to the ranks and not yet committed."""
        return len(self._in_flight)

    def step(self) -> list[TokenOutput]:
        """Submit steps while there is room for them, then wait for the oldest in flight and return its outputs.

        Under async scheduling a step that had to wait for this one's tokens, as one with drafts does, is submitted
        before the outputs are returned: the caller handles them while the ranks compute.

        Raises `EngineError` if a rank fails, after which the core is shut down.
        """
        self.watch.begin()
        try:
            if self.role:
                self.role.poll()
            self._submit_steps()
            if self._in_flight:
                self.watch.wait_for(self._in_flight[0].plan.step, self._tokens_in_flight())
                outputs = self._finish_step(self.executor.collect(self.watch.check))
                if self._submits_early:
                    self._submit_steps(early=True)
                return outputs
            if self.role and self._stop_checks:  # all requests wait for other instances
                self.role.wait(_POLL_SECONDS)
            return []
        except BaseException:  # also KeyboardInterrupt: ranks and scheduler may differ now, so no step can follow
            self._in_flight.clear()
            self.shutdown()
            raise
        finally:
            self.watch.end()

    def stats(self) -> EngineStats:
        """A snapshot of requests, pages and counters."""
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
        """End every rank. May be called more than once."""
        self.executor.shutdown()
        if self._offload:
            self._offload.close()
        if self.role:
            self.role.close()

    def _submit_steps(self, early: bool = False) -> None:
        """Submit steps while there is room for them, and something to compute. `early`: before the caller waits."""
        while self._has_room() and (plan := self.scheduler.schedule()):
            self.executor.submit(plan)
            for admission in plan.admitted:
                self._scheduled_at.setdefault(admission.request_id, time.monotonic())
            if self.role:
                self.role.submitted(plan)
            awaited = self.scheduler.awaits(plan)
            alone = not (self._in_flight or early)
            step = _StepInFlight(plan, time.perf_counter(), alone, *_tokens(plan), awaited)
            self._in_flight.append(step)

    def _has_room(self) -> bool:
        """Whether another step may be submitted.

        Steps that only decode may be more, but not while a request waits for its token: it would miss one step more.
        """
        others = any(step.prefill_tokens or step.is_awaited for step in self._in_flight)
        return len(self._in_flight) < (self.scheduler.steps_at_once if others else self.scheduler.decodes_at_once)

    def _tokens_in_flight(self) -> int:
        """Number of tokens computed or loaded by the steps in flight."""
        page_size = self.cache.page_size
        return sum(step.tokens + page_size * len(step.plan.loads) for step in self._in_flight)

    def _finish_step(self, result: StepResult) -> list[TokenOutput]:
        """Commit the oldest step in flight and return the outputs of its completions."""
        step = self._in_flight.popleft()
        plan = step.plan
        counted = self.scheduler.commit(plan, result)
        tokens_of: dict[str, list[SampledToken]] = {}
        for token in counted.tokens:
            if (found := tokens_of.get(token.request_id)) is None:
                tokens_of[token.request_id] = [token]
            else:
                found.append(token)
        scores_of: dict[str, list[PromptScore]] = {}
        for score in counted.prompt_scores:
            scores_of.setdefault(score.request_id, []).append(score)
        seconds = time.perf_counter() - step.submitted
        self._record(step, seconds)
        if step.alone and self.cache.offload:  # otherwise the seconds include waiting for earlier steps
            self.cache.offload.took(plan.loads, step.prefill_tokens, step.decode_rows, seconds)
        outputs = [
            self._output(each, tokens_of.get(each, ()), scores_of.get(each, ()), counted.errors.get(each))
            for each in dict.fromkeys((*scores_of, *tokens_of, *counted.errors))
        ]
        return [output for output in outputs if output is not None]

    def _output(
        self, request_id: str, tokens: Sequence[SampledToken], scores: Sequence[PromptScore], error: str | None
    ) -> TokenOutput | None:
        """The output of a completion in this step; None for a prompt that was computed for another instance."""
        cached = self.scheduler.cached_tokens(request_id)
        kept, reason = self._stop_checks[request_id].take(tokens)
        if error is not None:
            reason = FinishReason.ERROR
        scheduled_at = self._scheduled_at.get(request_id)
        output = TokenOutput(request_id, kept, reason, cached, tuple(scores), error, scheduled_at)
        if reason is not None and self.role and self.role.holds(output):
            self._forget(request_id)
            self.scheduler.hold(request_id)
            return None
        if reason is not None:
            self.finish(request_id)
        return output

    def _forget(self, request_id: str) -> None:
        self._stop_checks.pop(request_id, None)
        self._scheduled_at.pop(request_id, None)

    def _record(self, step: _StepInFlight, seconds: float) -> None:
        """Record a finished step for reports and for the time limit."""
        plan, chunk, rows = step.plan, step.prefill_tokens, step.decode_rows
        self.watch.measured(chunk + rows, seconds)
        self._schedules["decode"] = plan.decode_schedules[0] if rows else self._schedules["decode"]
        self._schedules["prefill"] = plan.prefill_schedules[0] if chunk else self._schedules["prefill"]
        self.recent.append(
            StepRecord(plan.step, rows, chunk, plan.decode_schedules[0], plan.prefill_schedules[0], seconds)
        )
        for shard in range(self.cache.num_shards):
            self._peak[shard] = max(self._peak[shard], self.cache.used(shard))


def _tokens(plan: StepPlan) -> tuple[int, int]:
    """(prompt tokens, decode tokens) that a step computes."""
    found = [0, 0]
    for segment in plan.segments:
        found[not segment.prefill] += segment.length
    return found[0], found[1]
