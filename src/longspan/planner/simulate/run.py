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

_MAX_SAMPLES = 400  # samples of memory use
_FIRST_INTERVAL_S = 0.01  # seconds between samples at the start
_RUNNING_TOKENS = 512  # tokens of work that a request on an instance counts for when a new one is assigned


@dataclass(frozen=True)
class Memory:
    """KV pages in use over time."""

    interval_s: float  # seconds between samples; the first is at 0
    pages_per_shard: tuple[int, ...]
    used: tuple[tuple[tuple[int, ...], ...], ...]  # pages in use, [instance][shard][sample]
    peak: tuple[tuple[int, ...], ...]  # the most pages in use at any time, [instance][shard]


@dataclass(frozen=True)
class Simulation:
    """The results of a simulated trace."""

    report: RunReport  # latencies and throughput
    memory: Memory
    requests_by_instance: tuple[int, ...]
    steps: int  # of all instances
    preemptions: int  # of all instances
    cached_tokens: int  # prompt tokens that were in a prefix cache when their request arrived


class _Samples:
    """Pages in use at regular intervals. With too many samples every second one is dropped and the interval doubles."""

    def __init__(self, instances: Sequence[SimulatedInstance]) -> None:
        self.interval_s = _FIRST_INTERVAL_S
        self._instances = instances
        self._taken: list[list[tuple[int, ...]]] = []

    @property
    def due_s(self) -> float:
        """The time of the next sample."""
        return len(self._taken) * self.interval_s

    def take(self) -> None:
        """Take a sample. All instances must have advanced to `due_s`."""
        self._taken.append([instance.used_pages() for instance in self._instances])
        if len(self._taken) > _MAX_SAMPLES:
            self._taken = self._taken[::2]
            self.interval_s *= 2

    def memory(self, pages_per_shard: tuple[int, ...]) -> Memory:
        """All samples and peaks."""
        used = tuple(
            tuple(zip(*(sample[number] for sample in self._taken), strict=True))
            for number in range(len(self._instances))
        )
        peak = tuple(tuple(instance.peak_pages) for instance in self._instances)
        return Memory(self.interval_s, pages_per_shard, used, peak)


class _Run:
    """A running simulation: its instances, and its results so far."""

    def __init__(self, config: InstanceConfig, instances: int, limits: Limits) -> None:
        self.instances = [SimulatedInstance(config) for _ in range(instances)]
        self.samples = _Samples(self.instances)
        self.assigned: list[int] = [0] * instances
        self.cached_tokens = 0
        self.completions: dict[int, SimulatedCompletion] = {}
        self.refused: dict[int, Failure] = {}
        self.peak = 0
        self._page_size, self._limits = config.page_size, limits

    def arrive(self, request: TraceRequest) -> None:
        """Advance to the arrival of the request, and assign it to an instance."""
        self.advance(request.arrival_s)
        try:
            self._limits.check(request.prompt_tokens, SamplingParams(max_tokens=request.max_tokens))
        except RequestError as error:
            self.refused[request.number] = Failure(type(error).__name__, str(error))
            return
        keys = list(request.page_keys(self._page_size))[: (request.prompt_tokens - 1) // self._page_size]
        cached = [instance.cached_tokens(keys) for instance in self.instances]
        chosen = choose(self.instances, cached)
        self.assigned[chosen] += 1
        self.cached_tokens += cached[chosen]
        self.completions[request.number] = self.instances[chosen].add(
            request.number, request.prompt_tokens, request.max_tokens, keys, request.arrival_s
        )
        self.peak = max(self.peak, sum(instance.running for instance in self.instances))

    def advance(self, until: float) -> None:
        """Advance all instances to `until` (infinity: until all requests have ended), and take samples meanwhile."""
        while self.samples.due_s < until and (until < math.inf or any(i.running for i in self.instances)):
            due = self.samples.due_s
            for instance in self.instances:
                instance.advance(due)
            self.samples.take()
        if until < math.inf:
            for instance in self.instances:
                instance.advance(until)


def choose(instances: Sequence[SimulatedInstance], cached: Sequence[int]) -> int:
    """The instance with the least work before the request's first token; among equals the first.

    The work is the uncached prompt tokens of requests there without a token, plus 512 tokens for each request there,
    less the tokens of the request's prompt that its prefix cache has.
    """
    return min(
        range(len(instances)),
        key=lambda n: instances[n].queued_prompt_tokens + _RUNNING_TOKENS * instances[n].running - cached[n],
    )


def simulate(
    config: InstanceConfig,
    requests: Sequence[TraceRequest],
    instances: int,
    limits: Limits,
    on_done: Callable[[int], None],
) -> Simulation:
    """Simulate requests, in order of arrival, on `instances` engines. `on_done` is called with the number assigned."""
    run = _Run(config, instances, limits)
    for number, request in enumerate(requests, 1):
        run.arrive(request)
        on_done(number)
    run.advance(math.inf)
    outcomes = tuple(_outcome(request, run) for request in requests)
    seconds = max((o.chunk_times[-1] for o in outcomes if o.chunk_times), default=0.0)
    return Simulation(
        report=summarise(Finished(outcomes, max(seconds, _FIRST_INTERVAL_S), run.peak, 0.0), None),
        memory=run.samples.memory(config.pages_per_shard),
        requests_by_instance=tuple(run.assigned),
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
