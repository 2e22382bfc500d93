"""The valid layouts on a number of devices, ordered by an objective.

It owns the search and the order. The engine's own checks decide whether a layout is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from longspan.config import ParallelConfig, require, require_choice
from longspan.errors import ConfigError
from longspan.parallel.grid import layouts
from longspan.planner.deployment import Deployment
from longspan.planner.forecast import Forecast, TrafficLoad, forecast

# sort keys of the objectives: the smallest value is the best
_ORDERS: Mapping[str, Callable[[Forecast, TrafficLoad], float]] = {
    "e2e": lambda found, load: found.ttft.seconds + (load.output - 1) * found.tpot.seconds,
    "ttft": lambda found, _: found.ttft.seconds,
    "tpot": lambda found, _: found.tpot.seconds,
    "throughput": lambda found, _: -found.throughput_per_gpu,
    "capacity": lambda found, _: -found.capacity_tokens,
}
OBJECTIVES = tuple(_ORDERS)
_MAX_NAMED = 6  # layouts that an error names
_MAX_DOUBLINGS = 6  # how often the number of devices is doubled in search of one that is sufficient


@dataclass(frozen=True)
class FixedSizes:
    """The sizes that the user has fixed; None: any size."""

    tp: int | None = None  # tensor-parallel ranks
    pcp: int | None = None  # prefill context-parallel ranks
    dcp: int | None = None  # decode context-parallel ranks of a TP group
    pp: int | None = None  # pipeline stages

    def allows(self, parallel: ParallelConfig) -> bool:
        """Whether the layout has these sizes."""
        sizes = (
            (self.tp, parallel.tensor_parallel_size), (self.pcp, parallel.prefill_context_parallel_size),
            (self.dcp, parallel.decode_context_parallel_size), (self.pp, parallel.pipeline_parallel_size),
        )  # fmt: skip
        return all(wanted in (None, size) for wanted, size in sizes)


def plan_layouts(base: Deployment, gpus: int, fixed: FixedSizes, load: TrafficLoad, objective: str) -> list[Forecast]:
    """A forecast for every valid layout of `base`: the best first, and last those in which one request does not fit.

    Raises `ConfigError` if no layout has the fixed sizes, naming valid ones, or if none fits, naming what is missing.
    """
    require_choice("objective", objective, OBJECTIVES)
    valid, refused = _valid(base, gpus)
    chosen = [deployed for deployed in valid if fixed.allows(deployed.parallel)]
    if not chosen:
        if refused is not None and not valid:
            raise refused
        names = ", ".join(deployed.parallel.name for deployed in valid[:_MAX_NAMED])
        more = f" and {len(valid) - _MAX_NAMED} more" if len(valid) > _MAX_NAMED else ""
        raise ConfigError(
            "layout", _wanted(fixed), f"is not possible on {gpus} devices with this model", f"use one of {names}{more}"
        )
    found = [forecast(deployed, load) for deployed in chosen]
    order = _ORDERS[objective]
    fitting = sorted((one for one in found if one.fits and one.running), key=lambda one: order(one, load))
    if not fitting:
        raise _does_not_fit(base, min(found, key=lambda one: one.missing_bytes), valid, gpus, load)
    return fitting + sorted((one for one in found if one not in fitting), key=lambda one: one.missing_bytes)


def pareto_set(found: Sequence[Forecast], load: TrafficLoad, objective: str) -> list[Forecast]:
    """The Pareto set of time to first token, time per output token and the objective.

    Of layouts with equal values the first is kept.
    """
    order = _ORDERS[objective]
    values = [(one.ttft.seconds, one.tpot.seconds, order(one, load)) for one in found]
    return [
        one
        for number, (one, own) in enumerate(zip(found, values, strict=True))
        if one.running
        and not any(
            all(other <= mine for other, mine in zip(others, own, strict=True)) and (others != own or at < number)
            for at, others in enumerate(values)
            if at != number
        )
    ]


def fast_enough(found: Sequence[Forecast], max_ttft: float | None, max_tpot: float | None) -> list[Forecast]:
    """The layouts within both limits, in seconds. Raises `ConfigError`, which names the fastest layout, if none is."""
    kept = list(found)
    for name, limit, value, unit, scale in (
        ("max_ttft", max_ttft, attrgetter("ttft.seconds"), "s", 1.0),
        ("max_tpot", max_tpot, attrgetter("tpot.seconds"), "ms", 1e3),
    ):
        if limit is None:
            continue
        shown = f"{limit * scale:g} {unit}"  # in the flag's unit
        require(limit > 0, name, shown, "must be positive", "leave it out for no limit")
        fastest = min(kept, key=value)
        kept = [one for one in kept if value(one) <= limit]
        problem = f"no layout is that fast: {fastest.parallel.short_name} takes {value(fastest) * scale:,.3g} {unit}"
        require(bool(kept), name, shown, problem, "raise the limit or use more devices")
    return kept


def smallest_layout(base: Deployment, tokens: int) -> ParallelConfig:
    """The layout on the fewest devices (a power of two) in which a request of `tokens` tokens fits.

    It prefers tensor parallelism, then context parallelism, then pipeline stages. Raises `ConfigError` if the request
    does not fit on 64 devices either.
    """
    size = 1
    for _ in range(_MAX_DOUBLINGS + 1):
        fitting = [one.parallel for one in _valid(base, size)[0] if one.missing_bytes(tokens) <= 0]
        if fitting:
            return min(fitting, key=lambda one: (
                one.pipeline_parallel_size, one.prefill_context_parallel_size, one.decode_context_parallel_size
            ))  # fmt: skip
        size *= 2
    problem = f"a request of {tokens:,} tokens does not fit on {size >> 1} devices"
    raise ConfigError("layout", "(the smallest)", problem, "use smaller data types or shorter requests")


def _valid(base: Deployment, gpus: int) -> tuple[list[Deployment], ConfigError | None]:
    """The deployments of all valid layouts, and the error of the last invalid one."""
    found: list[Deployment] = []
    refused: ConfigError | None = None
    for parallel in layouts(gpus, base.parallel.enable_expert_parallel):
        try:
            found.append(replace(base, parallel=parallel))
        except ConfigError as error:
            refused = error
    return found, refused


def _does_not_fit(
    base: Deployment, best: Forecast, valid: Sequence[Deployment], gpus: int, load: TrafficLoad
) -> ConfigError:
    """The error for a load that fits no layout on `gpus` devices; it names layouts on more devices that are enough."""
    fitting = [deployed for deployed in valid if deployed.missing_bytes(load.tokens) <= 0]
    size = gpus
    for _ in range(_MAX_DOUBLINGS):
        if fitting:
            break
        size *= 2
        fitting = [deployed for deployed in _valid(base, size)[0] if deployed.missing_bytes(load.tokens) <= 0]
    names = ", ".join(deployed.parallel.name for deployed in fitting[:_MAX_NAMED])
    remedy = f"use {size} devices, with {names}" if fitting else "use smaller data types or a shorter context"
    return ConfigError(
        "layout", best.parallel.name,
        f"a rank lacks {best.missing_bytes / 1e9:,.1f} GB for one request of {load.tokens:,} tokens", remedy,
    )  # fmt: skip


def _wanted(fixed: FixedSizes) -> str:
    """The fixed sizes as text, as in `tp=8,dcp=2`."""
    sizes = {"tp": fixed.tp, "pcp": fixed.pcp, "dcp": fixed.dcp, "pp": fixed.pp}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
