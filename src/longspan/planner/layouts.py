"""Which layouts a number of devices allows, in order of what a user wants of them.

It owns the search and the order; whether a layout is valid the engine's own rules say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from longspan.config import ParallelConfig, require_choice
from longspan.errors import ConfigError
from longspan.parallel.grid import layouts
from longspan.planner.deployment import Deployment
from longspan.planner.outlook import Load, Outlook, outlook

_ORDERS: Mapping[str, Callable[[Outlook], float]] = {
    "ttft": lambda found: found.ttft.seconds,
    "tpot": lambda found: found.tpot.seconds,
    "throughput": lambda found: -found.throughput_per_gpu,
    "capacity": lambda found: -found.capacity_tokens,
}
OBJECTIVES = tuple(_ORDERS)
_MOST_NAMED, _MOST_DOUBLINGS = 6, 6


@dataclass(frozen=True)
class Fixed:
    """Sizes the user has decided on; None leaves a size open."""

    tp: int | None = None
    pcp: int | None = None
    dcp: int | None = None
    pp: int | None = None

    def allows(self, parallel: ParallelConfig) -> bool:
        """Whether the layout has these sizes."""
        sizes = (
            (self.tp, parallel.tensor_parallel_size), (self.pcp, parallel.prefill_context_parallel_size),
            (self.dcp, parallel.decode_context_parallel_size), (self.pp, parallel.pipeline_parallel_size),
        )  # fmt: skip
        return all(wanted in (None, size) for wanted, size in sizes)


def plan_layouts(base: Deployment, gpus: int, fixed: Fixed, load: Load, objective: str) -> list[Outlook]:
    """An outlook on every valid layout, the best first, those without room last; `base` has all but the layout.

    Raises `ConfigError` if no layout is valid, with the sizes that are, or none has room, with what is missing.
    """
    require_choice("objective", objective, OBJECTIVES)
    valid, refused = _valid(base, gpus)
    chosen = [deployed for deployed in valid if fixed.allows(deployed.parallel)]
    if not chosen:
        if refused is not None and not valid:
            raise refused
        names = ", ".join(deployed.parallel.name for deployed in valid[:_MOST_NAMED])
        more = f" and {len(valid) - _MOST_NAMED} more" if len(valid) > _MOST_NAMED else ""
        raise ConfigError(
            "layout", _wanted(fixed), f"is not possible on {gpus} devices with this model", f"use one of {names}{more}"
        )
    found = [outlook(deployed, load) for deployed in chosen]
    fitting = sorted((one for one in found if one.fits and one.running), key=_ORDERS[objective])
    if not fitting:
        raise _no_room(base, min(found, key=lambda one: one.missing_bytes), valid, gpus, load)
    return fitting + sorted((one for one in found if one not in fitting), key=lambda one: one.missing_bytes)


def _valid(base: Deployment, gpus: int) -> tuple[list[Deployment], ConfigError | None]:
    """Deployments of all valid layouts, and why the last of the others is not."""
    found: list[Deployment] = []
    refused: ConfigError | None = None
    for parallel in layouts(gpus, base.parallel.enable_expert_parallel):
        try:
            found.append(replace(base, parallel=parallel))
        except ConfigError as error:
            refused = error
    return found, refused


def _no_room(base: Deployment, best: Outlook, valid: Sequence[Deployment], gpus: int, load: Load) -> ConfigError:
    fitting = [deployed for deployed in valid if deployed.missing_bytes(load.tokens) <= 0]
    size = gpus
    for _ in range(_MOST_DOUBLINGS):
        if fitting:
            break
        size *= 2
        fitting = [deployed for deployed in _valid(base, size)[0] if deployed.missing_bytes(load.tokens) <= 0]
    names = ", ".join(deployed.parallel.name for deployed in fitting[:_MOST_NAMED])
    remedy = f"on {size} devices there is room with {names}" if fitting else "use a smaller format or a shorter context"
    return ConfigError(
        "layout", best.parallel.name,
        f"a rank lacks {best.missing_bytes / 1e9:,.1f} GB for one request of {load.tokens:,} tokens", remedy,
    )  # fmt: skip


def _wanted(fixed: Fixed) -> str:
    sizes = {"tp": fixed.tp, "pcp": fixed.pcp, "dcp": fixed.dcp, "pp": fixed.pp}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
