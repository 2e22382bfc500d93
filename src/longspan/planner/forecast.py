"""What a layout promises for a load: what fits, time to first token, time per output token, throughput.

It owns the way from a load to steps; how long a step takes is the step model's.
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

_MOST_REQUESTS = 256
_EXCHANGED = ("tp", "exchange")  # parts of a step in which computing waits


@dataclass(frozen=True)
class TrafficLoad:
    """`concurrency` requests (None: as many as fit, up to 256) of `context` tokens, of which the last `new` are not
    in the cache (None: none is), and `output` tokens generated for each. Raises `ConfigError`."""

    context: int
    new: int | None = None
    output: int = 256
    concurrency: int | None = 1

    def __post_init__(self) -> None:
        for name in ("context", "output"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "give tokens")
        if self.new is not None:
            require(1 <= self.new <= self.context, "new", self.new, f"is not in 1..{self.context}", "lower it")
        if self.concurrency is not None:
            require(self.concurrency >= 1, "concurrency", self.concurrency, "must be at least 1", "give requests")

    @property
    def tokens(self) -> int:
        """Tokens one request stores in the end; the last one's keys are never needed."""
        return self.context + self.output - 1


@dataclass(frozen=True)
class Interval:
    """Seconds, what bounds most of them, and what they are made of."""

    seconds: float
    bound: str
    parts: Mapping[str, float]

    @property
    def exposed(self) -> float:
        """Seconds in which ranks wait for each other's bytes."""
        return sum(self.parts.get(name, 0.0) for name in _EXCHANGED)


@dataclass(frozen=True)
class Forecast:
    """One layout under a load. `missing_bytes` of a rank for one request; without room there are no times.

    `throughput_per_gpu` is output tokens a second and device when `running` requests are filled in and generated.
    """

    parallel: ParallelConfig
    capacity_tokens: int
    requests: int
    cache_bytes: float
    missing_bytes: float
    running: int = 0
    ttft: Interval = field(default_factory=lambda: Interval(math.inf, "", {}))
    tpot: Interval = field(default_factory=lambda: Interval(math.inf, "", {}))
    throughput_per_gpu: float = 0.0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """tp, pcp, dcp and pp."""
        at = self.parallel
        return (
            at.tensor_parallel_size, at.prefill_context_parallel_size, at.decode_context_parallel_size,
            at.pipeline_parallel_size,
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        """Whether one request has room."""
        return self.missing_bytes <= 0


def forecast(deployed: Deployment, load: TrafficLoad) -> Forecast:
    """What the deployment promises."""
    capacity = deployed.capacity_tokens
    found = Forecast(
        deployed.parallel, capacity, math.floor(capacity / load.tokens), deployed.cache_bytes,
        deployed.missing_bytes(load.tokens),
    )  # fmt: skip
    if not found.fits or not found.requests:
        return found
    running = min(found.requests, load.concurrency or _MOST_REQUESTS)
    model = StepModel(deployed)
    ttft = time_to_first_token(model, load.context, load.new or load.context)
    tpot = time_per_token(model, load.context + math.ceil(load.output / 2), running)
    lasting = running * ttft.seconds + load.output * tpot.seconds
    per_gpu = running * load.output / lasting / deployed.grid.world_size
    return replace(found, running=running, ttft=ttft, tpot=tpot, throughput_per_gpu=per_gpu)


def time_to_first_token(model: StepModel, context: int, new: int) -> Interval:
    """One request alone, its `new` last tokens of `context` computed chunk by chunk."""
    return through_stages(model, [[chunk] for chunk in prompt_chunks(model.deployment, context, new)])


def time_per_token(
    model: StepModel, context: int, running: int, schedule: str = "auto", new: int = 1, padded: bool = False
) -> Interval:
    """`running` requests that decode `new` tokens at once; each pipeline stage works on a share of them.

    With `padded` every pcp index has as many requests, the busiest one's number.
    """
    grid = model.deployment.grid
    seen, places = even_shares(context, grid.num_shards), range(grid.pcp)
    share = math.ceil(running / grid.pp)
    homes = islice(cycle(places), math.ceil(share / grid.pcp) * grid.pcp if padded else share)
    chunks = [
        Chunk(new, context - new, tuple(new * (home == place) for place in places), seen, False) for home in homes
    ]
    step = model.time(chunks, schedule, schedule)
    return Interval(step.seconds, step.bound, step.parts)


def through_stages(model: StepModel, steps: Iterable[Sequence[Chunk]], schedule: str = "auto") -> Interval:
    """Steps that follow each other through the pipeline's stages; `bubble` is while it fills and empties.

    Every stage takes an equal part of a step's time. It begins when it has done the step before, and the stage before
    it has done this one. So the last stage is done after the sum of all parts, and the longest once more for each
    other stage, in whatever order long and short ones come.
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
    """The `new` last tokens of `context`, cut to a stage's share of what is computed at once; spread evenly."""
    at, found = context - new, []
    while at < context:
        tokens = min(deployed.chunk_tokens, context - at)
        found.append(prompt_chunk(deployed, at, tokens))
        at += tokens
    return found


def prompt_chunk(deployed: Deployment, cached: int, new: int) -> Chunk:
    """Tokens of a prompt behind `cached` others, all spread evenly."""
    grid = deployed.grid
    return Chunk(new, cached, even_shares(new, grid.pcp), even_shares(cached + new, grid.num_shards), True)


def even_shares(tokens: int, places: int) -> tuple[int, ...]:
    """Tokens of each place, as even as can be."""
    return tuple(stop - start for start, stop in (split_evenly(tokens, places, n) for n in range(places)))
