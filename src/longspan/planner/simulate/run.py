"""Plays a trace of requests to simulated engines on a virtual clock: assigns each request, and collects the results.

It owns the order of events and the samples of memory use; it must not know what a step computes or how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.bench.serving.client import Failure, Finished, Outcome
from longspan.bench.serving.report import RunReport, summarise
from longspan.errors import RequestError
from longspan.planner.simulate.instance import InstanceConfig, SimulatedCompletion, SimulatedInstance
from longspan.planner.simulate.trace_requests import TraceRequest
from longspan.request import SamplingParams
from longspan.scheduler.limits import Limits

_MOST_SAMPLES = 400
_FIRST_INTERVAL_S = 0.01
_RUNNING_TOKENS = 512  # what a request that decodes counts for when a new one is given away


@dataclass(frozen=True)
class Memory:
    """Pages in use every `interval_s` seconds from 0: `used[instance][shard][sample]`, and the most there ever were."""

    interval_s: float
    pages_per_shard: tuple[int, ...]
    used: tuple[tuple[tuple[int, ...], ...], ...]
    peak: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Simulation:
    """What came of a trace. `cached_tokens` are prompt tokens found in a prefix cache when a request arrived."""

    report: RunReport
    memory: Memory
    requests_by_instance: tuple[int, ...]
    steps: int
    preemptions: int
    cached_tokens: int


class _Samples:
    """Pages in use at even times. With too many samples every second one goes and the interval doubles."""

    def __init__(self, instances: Sequence[SimulatedInstance]) -> None:
        self.interval_s = _FIRST_INTERVAL_S
        self._instances = instances
        self._taken: list[list[tuple[int, ...]]] = []

    @property
    def due_s(self) -> float:
        """When the next one is to be taken."""
        return len(self._taken) * self.interval_s

    def take(self) -> None:
        """All instances have advanced to `due_s`."""
        self._taken.append([instance.used_pages() for instance in self._instances])
        if len(self._taken) > _MOST_SAMPLES:
            self._taken = self._taken[::2]
            self.interval_s *= 2

    def memory(self, pages_per_shard: tuple[int, ...]) -> Memory:
        """All of them."""
        used = tuple(
            tuple(zip(*(sample[number] for sample in self._taken), strict=True))
            for number in range(len(self._instances))
        )
        peak = tuple(tuple(instance.peak_pages) for instance in self._instances)
        return Memory(self.interval_s, pages_per_shard, used, peak)


class _Run:
    """One simulation in flight."""

    def __init__(self, config: InstanceConfig, instances: int, limits: Limits) -> None:
        self.instances = [SimulatedInstance(config) for _ in range(instances)]
        self.samples = _Samples(self.instances)
        self.given: list[int] = [0] * instances
        self.cached_tokens = 0
        self.completions: dict[int, SimulatedCompletion] = {}
        self.refused: dict[int, Failure] = {}
        self.peak = 0
        self._page_size, self._limits = config.page_size, limits

    def arrive(self, request: TraceRequest) -> None:
        """Let time pass until the request comes, and give it to an instance."""
        self.pass_time(request.arrival_s)
        try:
            self._limits.check(request.prompt_tokens, SamplingParams(max_tokens=request.max_tokens))
        except RequestError as error:
            self.refused[request.number] = Failure(type(error).__name__, str(error))
            return
        keys = list(request.page_keys(self._page_size))[: (request.prompt_tokens - 1) // self._page_size]
        cached = [instance.cached_tokens(keys) for instance in self.instances]
        chosen = choose(self.instances, cached)
        self.given[chosen] += 1
        self.cached_tokens += cached[chosen]
        self.completions[request.number] = self.instances[chosen].add(
            request.number, request.prompt_tokens, request.max_tokens, keys, request.arrival_s
        )
        self.peak = max(self.peak, sum(instance.running for instance in self.instances))

    def pass_time(self, until: float) -> None:
        """All instances go on until then, or until they have nothing to do; samples are taken on the way."""
        while self.samples.due_s < until and (until < math.inf or any(i.running for i in self.instances)):
            due = self.samples.due_s
            for instance in self.instances:
                instance.advance(due)
            self.samples.take()
        if until < math.inf:
            for instance in self.instances:
                instance.advance(until)


def choose(instances: Sequence[SimulatedInstance], cached: Sequence[int]) -> int:
    """The instance that has least to compute until the request's first token.

    That is the tokens of prompts before it, less what its cache has of the request's own, and a block of tokens for
    each request that runs there. The first of equals.
    """
    return min(
        range(len(instances)),
        key=lambda n: instances[n].prompt_tokens_ahead + _RUNNING_TOKENS * instances[n].running - cached[n],
    )


def simulate(
    config: InstanceConfig,
    requests: Sequence[TraceRequest],
    instances: int,
    limits: Limits,
    on_done: Callable[[int], None],
) -> Simulation:
    """Play the requests, in order of arrival, to `instances` engines; `on_done` hears how many have arrived."""
    run = _Run(config, instances, limits)
    for number, request in enumerate(requests, 1):
        run.arrive(request)
        on_done(number)
    run.pass_time(math.inf)
    outcomes = tuple(_outcome(request, run) for request in requests)
    seconds = max((o.chunk_times[-1] for o in outcomes if o.chunk_times), default=0.0)
    return Simulation(
        report=summarise(Finished(outcomes, max(seconds, _FIRST_INTERVAL_S), run.peak, 0.0), None),
        memory=run.samples.memory(config.pages_per_shard),
        requests_by_instance=tuple(run.given),
        steps=sum(instance.steps for instance in run.instances),
        preemptions=sum(instance.scheduler.preemptions for instance in run.instances),
        cached_tokens=run.cached_tokens,
    )


def _outcome(request: TraceRequest, run: _Run) -> Outcome:
    completion = run.completions.get(request.number)
    times = tuple(completion.token_times) if completion else ()
    return Outcome(
        request.arrival_s, request.arrival_s, times, request.prompt_tokens, len(times), request.max_tokens, False,
        run.refused.get(request.number),
    )  # fmt: skip
