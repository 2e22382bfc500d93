"""The engine: requests in, tokens and text out, one step at a time.

It owns requests from arrival to their last output and what is reported about the engine; it must
not know how ranks run (the executor does) nor which tokens a step computes (the scheduler does).
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import SupportsIndex

from longspan.attention.cost import CostConstants, ScheduleChooser
from longspan.cache.manager import CacheManager
from longspan.cache.pages import PageRef
from longspan.cache.prefix import root_key
from longspan.config import EngineConfig
from longspan.engine.completion import Completion
from longspan.engine.detokenizer import Tokenizer
from longspan.engine.executors.base import Executor
from longspan.engine.executors.processes import ProcessExecutor
from longspan.engine.executors.threads import ThreadExecutor
from longspan.engine.setup import EngineSetup, resolve
from longspan.errors import RequestError
from longspan.parallel.collectives import Traffic
from longspan.plan import StepPlan
from longspan.request import FinishReason, RequestOutput, SampledToken, SamplingParams
from longspan.scheduler.scheduler import Scheduler, SchedulerCounters
from longspan.scheduler.sequence import SequenceState

_CONTEXT_TOKENS = 16  # of the prompt, for tokenizers that need to see what a token follows
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads the n completions' seeds


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


@dataclass
class _Group:
    """One user's request and its `n` completions; those not started wait for the first one's prompt pages."""

    output: RequestOutput
    params: SamplingParams
    max_tokens: int
    completions: list[Completion]
    unstarted: list[Completion]


def create_executor(setup: EngineSetup) -> Executor:
    """The executor the configuration names."""
    kinds: dict[str, Callable[[EngineSetup], Executor]] = {
        "threads": ThreadExecutor,
        "processes": ProcessExecutor,
    }
    return kinds[setup.config.executor](setup)


class Engine:
    """Continuous batching over an executor. Not thread-safe: one caller steps it.

    Raises `ConfigError` and `ModelError` when built, `RequestError` from `add_request`, `EngineError` from `step`.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None = None, setup: EngineSetup | None = None):
        self.setup = setup or resolve(config)
        self.config = config = self.setup.config
        self.tokenizer = tokenizer
        cache = config.cache
        self.cache = CacheManager(cache.page_size, self.setup.pages_per_shard, cache.enable_prefix_caching)
        self.executor = create_executor(self.setup)
        self.constants = config.cost or self.executor.constants or CostConstants()
        self.scheduler = Scheduler(
            config.scheduler, self.setup.max_model_len, self.cache, self.setup.grid,
            ScheduleChooser(self.setup.cost_model(self.constants), config.scheduler.schedule),
            root_key(self.setup.source.name, str(self.setup.dtype), cache.page_size), self.setup.model.kinds,
        )  # fmt: skip
        self._under_way: deque[StepPlan] = deque()
        self._ids = count()
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[int, tuple[_Group, Completion]] = {}
        self._ended: list[RequestOutput] = []
        self._schedules = {"prefill": "local", "decode": "local"}
        self._peak = [0] * self.cache.num_shards

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[SupportsIndex],
        params: SamplingParams,
        prompt: str | None = None,
    ) -> None:
        """Queue a request. Raises `RequestError` at once if it can never be served."""
        if request_id in self._groups:
            raise RequestError("request_id", request_id, "is in use", "choose another")
        vocabulary = self.setup.model.vocab_size
        tokens = _integers(prompt_token_ids)
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise RequestError("prompt_token_ids", token, f"is not in 0..{vocabulary - 1}", "check the tokenizer")
        max_tokens = self.scheduler.check(len(tokens), params)
        seed = self.config.seed if params.seed is None else params.seed
        completions: list[Completion] = []
        for index in range(params.n):
            number = next(self._ids)
            own = number if params.seed is None else index
            completions.append(
                Completion(
                    number, index, params, max_tokens, (seed + own * _SEED_STRIDE) % (1 << 63),
                    self.setup.model.eos_token_ids, self.tokenizer, tokens[-_CONTEXT_TOKENS:],
                )
            )  # fmt: skip
        output = RequestOutput(request_id, prompt, tokens, [c.output for c in completions])
        group = _Group(output, params, max_tokens, completions, [])
        self._groups[request_id] = group
        if max_tokens == 0:
            for completion in completions:
                completion.end(FinishReason.LENGTH)
            self._close(group)
            return
        self._start(group, completions[0])
        group.unstarted = completions[1:]
        if not self.config.cache.enable_prefix_caching:
            self._start_rest(group)

    def abort(self, request_id: str) -> None:
        """End a request now; its pages are free for the next step. Unknown ids are ignored."""
        group = self._groups.get(request_id)
        if group is None:
            return
        for completion in group.completions:
            if not completion.finished:
                self._drop(completion)
                completion.end(FinishReason.ABORT)
        self._close(group)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has work or outputs to give."""
        return bool(self._groups or self._ended or self._under_way)

    def progress(self, request_id: str) -> tuple[int, int]:
        """(prompt tokens computed or under way, prompt tokens) of a request's first completion: for a progress bar."""
        group = self._groups.get(request_id)
        total = len(group.output.prompt_token_ids) if group else 0
        sequence = self._first_sequence(request_id)
        return min(sequence.computed if sequence else 0, total), total

    def pages(self, request_id: str) -> list[PageRef]:
        """Where the context of a request's first completion lives now, in position order."""
        sequence = self._first_sequence(request_id)
        return list(sequence.table.pages) if sequence else []

    def step(self) -> list[RequestOutput]:
        """Give every pipeline stage a step to work on and finish the oldest.

        Returns the requests that changed, finished ones for the last time.
        """
        ended, self._ended = self._ended, []
        try:
            while len(self._under_way) < self.setup.grid.pp and (plan := self.scheduler.schedule()):
                self.executor.submit(plan)
                self._under_way.append(plan)
            if not self._under_way:
                return ended
            changed = self._deliver(self.executor.collect())
        except BaseException:  # an interrupt too: ranks, scheduler and outputs no longer agree on what was computed
            self._under_way.clear()
            self.executor.shutdown()
            raise
        outputs, self._ended = self._ended, []
        finished = {output.request_id for output in outputs}
        return [*ended, *outputs, *(o for i, o in changed.items() if i not in finished)]

    def _deliver(self, sampled: Sequence[SampledToken]) -> dict[str, RequestOutput]:
        """Commit the oldest step under way; its tokens go to their requests, which are returned by id."""
        plan = self._under_way.popleft()
        self.scheduler.commit(plan, sampled)
        self._record(plan)
        changed: dict[str, RequestOutput] = {}
        for token in sampled:
            if token.request_id not in self._group_of:
                continue
            group, completion = self._group_of[token.request_id]
            completion.append(token)
            changed[group.output.request_id] = group.output
            if completion.finished:
                self._drop(completion)
            self._start_rest(group)
            if all(c.finished for c in group.completions):
                self._close(group)
        return changed

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
        )

    def shutdown(self) -> None:
        """End every rank; safe to call again."""
        self.executor.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _first_sequence(self, request_id: str) -> SequenceState | None:
        group = self._groups.get(request_id)
        number = group.completions[0].number if group else None
        return next((s for s in self.scheduler.running if s.request_id == number), None)

    def _start(self, group: _Group, completion: Completion) -> None:
        self._group_of[completion.number] = (group, completion)
        self.scheduler.add(
            completion.number, group.output.prompt_token_ids, group.params, completion.seed, group.max_tokens
        )

    def _start_rest(self, group: _Group) -> None:
        """The prompt's pages can be found now: the other completions share them."""
        for completion in group.unstarted:
            self._start(group, completion)
        group.unstarted = []

    def _drop(self, completion: Completion) -> None:
        sequence = self.scheduler.finish(completion.number)
        entry = self._group_of.pop(completion.number, None)
        if entry and sequence and completion.index == 0:
            entry[0].output.num_cached_tokens = sequence.cached_tokens or 0

    def _close(self, group: _Group) -> None:
        group.output.finished = True
        del self._groups[group.output.request_id]
        self._ended.append(group.output)

    def _record(self, plan: StepPlan) -> None:
        for name, schedule, prefill in (
            ("prefill", plan.prefill_schedules[0], True),
            ("decode", plan.decode_schedules[0], False),
        ):
            if any(segment.prefill == prefill for segment in plan.segments):
                self._schedules[name] = schedule
        for shard in range(self.cache.num_shards):
            self._peak[shard] = max(self._peak[shard], self.cache.used(shard))


def _integers(prompt_token_ids: Sequence[SupportsIndex]) -> list[int]:
    """Plain integers, whatever integers the caller has; raises `RequestError`."""
    try:
        return [operator.index(token) for token in prompt_token_ids]
    except TypeError as error:
        raise RequestError("prompt_token_ids", prompt_token_ids, f"are not integers ({error})", "give ids") from error
