"""The forecast for a load under one layout: capacity, time to first token, time per output token, throughput.

It owns which steps a load needs. `StepModel` computes the time of each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

from longspan.config import ParallelConfig, require
from longspan.parallel.grid import split_evenly
from longspan.planner.deployment import Deployment
from longspan.planner.step import Chunk, StepModel

_MAX_REQUESTS = 256  # concurrent requests when the load does not limit them
_EXCHANGED = ("tp", "exchange")  # parts of a step in which ranks wait for data of other ranks


@dataclass(frozen=True)
class TrafficLoad:
    """Equal requests that run concurrently. Raises `ConfigError`."""

    context: int  # tokens of a request's prompt
    new: int | None = None  # last tokens of the prompt that are not in the prefix cache; None: all
    output: int = 256  # tokens generated for a request
    concurrency: int | None = 1  # number of requests; None: as many as fit, up to 256

    def __post_init__(self) -> None:
        for name in ("context", "output"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "give tokens")
        if self.new is not None:
            require(1 <= self.new <= self.context, "new", self.new, f"is not in 1..{self.context}", "lower it")
        if self.concurrency is not None:
            require(self.concurrency >= 1, "concurrency", self.concurrency, "must be at least 1", "give requests")

    @property
    def tokens(self) -> int:
        """Tokens of a finished request in the KV cache. Keys of its last token are never needed."""
        return self.context + self.output - 1


@dataclass(frozen=True)
class Interval:
    """A predicted time and its parts."""

    seconds: float
    bound: str  # what takes most of the time: compute, memory, link or latency; '' without a prediction
    parts: Mapping[str, float]  # seconds of each part, by name

    @property
    def exposed(self) -> float:
        """Seconds in which ranks wait for data of other ranks."""
        return sum(self.parts.get(name, 0.0) for name in _EXCHANGED)


@dataclass(frozen=True)
class Forecast:
    """The forecast for one layout under a load. Times are infinite if one request does not fit."""

    parallel: ParallelConfig
    capacity_tokens: int  # tokens that the KV cache of all ranks holds
    requests: int  # requests of the load that fit at once
    cache_bytes: float  # KV cache of one rank
    missing_bytes: float  # what one rank lacks for one request; 0 or less if it fits
    running: int = 0  # requests that run at once; 0 if none fits
    ttft: Interval = field(default_factory=lambda: Interval(math.inf, "", {}))
    tpot: Interval = field(default_factory=lambda: Interval(math.inf, "", {}))
    throughput_per_gpu: float = 0.0  # output tokens per second and device, the time of prefills included

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes tp, pcp, dcp and pp."""
        at = self.parallel
        return (
            at.tensor_parallel_size, at.prefill_context_parallel_size, at.decode_context_parallel_size,
            at.pipeline_parallel_size,
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        """Whether one request fits into the KV cache."""
        return self.missing_bytes <= 0


def forecast(deployed: Deployment, load: TrafficLoad) -> Forecast:
    """The forecast for a deployment under a load."""
    capacity = deployed.capacity_tokens
    found = Forecast(
        deployed.parallel, capacity, math.floor(capacity / load.tokens), deployed.cache_bytes,
        deployed.missing_bytes(load.tokens),
    )  # fmt: skip
    if not found.fits or not found.requests:
        return found
    running = min(found.requests, load.concurrency or _MAX_REQUESTS)
    model = StepModel(deployed)
    ttft = time_to_first_token(model, load.context, load.new or load.context)
    tpot = time_per_token(model, load.context + math.ceil(load.output / 2), running)
    seconds = running * ttft.seconds + load.output * tpot.seconds  # prefills one after the other, then decode
    per_gpu = running * load.output / seconds / deployed.grid.world_size
    return replace(found, running=running, ttft=ttft, tpot=tpot, throughput_per_gpu=per_gpu)


def time_to_first_token(model: StepModel, context: int, new: int) -> Interval:
    """Time to first token of one request, the only one. The `new` last tokens of `context` are computed in chunks."""
    return through_stages(model, [[chunk] for chunk in prompt_chunks(model.deployment, context, new)])


def time_per_token(
    model: StepModel, context: int, running: int, schedule: str = "auto", new: int = 1, padded: bool = False
) -> Interval:
    """Time of a step in which `running` requests decode `new` tokens each. Every pipeline stage has a share of them.

    With `padded` every pcp index gets as many requests as the one that has most.
    """
    grid = model.deployment.grid
    visible, indices = even_shares(context, grid.num_shards), range(grid.pcp)
    share = math.ceil(running / grid.pp)
    pcp_of_request = islice(cycle(indices), math.ceil(share / grid.pcp) * grid.pcp if padded else share)
    chunks = [
        Chunk(new, context - new, tuple(new * (pcp == index) for index in indices), visible, False)
        for pcp in pcp_of_request
    ]
    step = model.time(chunks, schedule, schedule)
    return Interval(step.seconds, step.bound, step.parts)


def through_stages(model: StepModel, steps: Iterable[Sequence[Chunk]], schedule: str = "auto") -> Interval:
    """Time of steps that pass through the pipeline stages, one behind the other.

    Every stage takes an equal part of a step's time. A stage starts a step when it has finished its previous step and
    the stage before it has finished this one. So the last stage finishes after the sum of its parts of all steps, plus
    the longest part once for each other stage, whatever the order of the steps. This second term is the part `bubble`:
    the time to fill and empty the pipeline.
    """
    stages = model.deployment.grid.pp
    parts: dict[str, float] = {}
    bounds: dict[str, float] = {}
    longest = 0.0
    for chunks in steps:
        step = model.time(chunks, schedule, schedule)
        longest = max(longest, step.seconds / stages)
        bounds[step.bound] = bounds.get(step.bound, 0.0) + step.seconds
        for name, seconds in step.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds / stages
    parts["bubble"] = (stages - 1) * longest
    return Interval(sum(parts.values()), max(bounds, key=bounds.__getitem__), parts)


def prompt_chunks(deployed: Deployment, context: int, new: int) -> list[Chunk]:
    """The `new` last tokens of `context` as chunks of at most `Deployment.chunk_tokens` tokens."""
    at, found = context - new, []
    while at < context:
        tokens = min(deployed.chunk_tokens, context - at)
        found.append(prompt_chunk(deployed, at, tokens))
        at += tokens
    return found


def prompt_chunk(deployed: Deployment, cached: int, new: int) -> Chunk:
    """`new` tokens of a prompt after `cached` ones; rows and pages are spread evenly over the ranks."""
    grid = deployed.grid
    return Chunk(new, cached, even_shares(new, grid.pcp), even_shares(cached + new, grid.num_shards), True)


def even_shares(tokens: int, parts: int) -> tuple[int, ...]:
    """Numbers of tokens of `parts` parts that differ by at most one."""
    return tuple(stop - start for start, stop in (split_evenly(tokens, parts, n) for n in range(parts)))
