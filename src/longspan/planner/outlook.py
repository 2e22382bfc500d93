"""What a layout promises for a load: what fits, time to first token, time per output token, throughput.

It owns the way from a load to steps; how long a step takes is the step model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

from longspan.config import ParallelConfig, require
from longspan.parallel.grid import split_evenly
from longspan.planner.deployment import Deployment
from longspan.planner.step import Chunk, StepModel

_MOST_REQUESTS = 256
_EXCHANGED = ("tp", "exchange")  # parts of a step in which computing waits


@dataclass(frozen=True)
class Load:
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
class Span:
    """Seconds, what bounds most of them, and what they are made of."""

    seconds: float
    bound: str
    parts: Mapping[str, float]

    @property
    def exposed(self) -> float:
        """Seconds in which ranks wait for each other's bytes."""
        return sum(self.parts.get(name, 0.0) for name in _EXCHANGED)


@dataclass(frozen=True)
class Outlook:
    """One layout under a load. `missing_bytes` of a rank for one request; without room there are no times.

    `throughput_per_gpu` is output tokens a second and device when `running` requests are filled in and generated.
    """

    parallel: ParallelConfig
    capacity_tokens: int
    requests: int
    cache_bytes: float
    missing_bytes: float
    running: int = 0
    ttft: Span = field(default_factory=lambda: Span(math.inf, "", {}))
    tpot: Span = field(default_factory=lambda: Span(math.inf, "", {}))
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


def outlook(deployed: Deployment, load: Load) -> Outlook:
    """What the deployment promises."""
    capacity = deployed.capacity_tokens
    found = Outlook(
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


def time_to_first_token(model: StepModel, context: int, new: int) -> Span:
    """One request alone, its `new` last tokens of `context` computed chunk by chunk.

    Stages work on different chunks at once; `bubble` is while the pipeline fills and empties.
    """
    grid, budget = model.deployment.grid, model.deployment.max_num_batched_tokens
    chunk, at = math.ceil(budget / grid.pp), context - new
    parts: dict[str, float] = {}
    bounds: dict[str, float] = {}
    last = 0.0
    while at < context:
        tokens = min(chunk, context - at)
        rows, seen = even_shares(tokens, grid.pcp), even_shares(at + tokens, grid.num_shards)
        step = model.time([Chunk(tokens, at, rows, seen, True)], "auto", "auto")
        at, last = at + tokens, step.seconds / grid.pp
        bounds[step.bound] = bounds.get(step.bound, 0.0) + last
        for name, seconds in step.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds / grid.pp
    parts["bubble"] = (grid.pp - 1) * last
    return Span(sum(parts.values()), max(bounds, key=bounds.__getitem__), parts)


def time_per_token(model: StepModel, context: int, running: int) -> Span:
    """`running` requests that decode at once; each pipeline stage works on a share of them."""
    grid = model.deployment.grid
    seen, places = even_shares(context, grid.num_shards), range(grid.pcp)
    homes = islice(cycle(places), math.ceil(running / grid.pp))
    chunks = [Chunk(1, context - 1, tuple(int(home == place) for place in places), seen, False) for home in homes]
    step = model.time(chunks, "auto", "auto")
    return Span(step.seconds, step.bound, step.parts)


def even_shares(tokens: int, places: int) -> tuple[int, ...]:
    """Tokens of each place, as even as can be."""
    return tuple(stop - start for start, stop in (split_evenly(tokens, places, n) for n in range(places)))
