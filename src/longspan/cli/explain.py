"""`longspan explain`: the estimated time of every schedule for one step, and which one the engine would choose.

It owns the table. Estimates come from the engine's cost model, with constants measured here or of named hardware.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from longspan.attention.cost import Estimate
from longspan.cli.options import Json
from longspan.cli.show import new_table
from longspan.config import CostConstants, EngineConfig, require

_BY_REFERENCE = 1e-13  # seconds per byte below which nothing is copied: threads pass references to tensors
_TERA = 1e4  # GFLOP/s from which on rates are shown in TFLOP/s
_LEGEND = (
    "*: the choice. Times in ms: fixed: starts of kernels and messages; transfer: bytes between ranks; "
    "copies: packing and merging; hidden: transfer that overlaps with compute, and so is subtracted"
)
New = Annotated[int, typer.Option("--new", help="new tokens of the request")]
Cached = Annotated[int, typer.Option("--cached", help="tokens of the request that are in the KV cache")]
HardwareName = Annotated[
    str | None,
    typer.Option("--hardware", help="name of hardware, as in h100, or a .yaml file; default: measure this machine"),
]


def explain(
    config: EngineConfig, new: New = 4096, cached: Cached = 100_000, hardware: HardwareName = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Estimate the time of each schedule for one step of one request, and show the choice."""
    require(new >= 1, "new", new, "must be at least 1", "give the new tokens of a step")
    require(cached >= 0, "cached", cached, "must not be negative", "give 0 for a fresh prompt")
    from longspan.bench.situation import Situation, estimates
    from longspan.engine.setup import resolve
    from longspan.planner.hardware import hardware as accelerator

    if hardware is not None:
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        config = replace(config, cost=accelerator(hardware).cost, dtype=dtype)
    if config.cost is not None:
        config = replace(config, executor="dry")  # nothing is run, so there may be more ranks than GPUs
    setup = resolve(config, needs_weights=False)
    constants = config.cost
    if constants is None:
        from longspan.bench.constants import measure_constants

        constants = measure_constants(setup)
    situation = Situation(setup.grid, new, cached, config.cache.page_size, setup.model.layer_groups)
    tables = estimates(situation, setup.cost_model(constants))
    if as_json:
        report = {
            "constants": asdict(constants),
            "kinds": [
                {"window": window, "schedules": [_as_json(e) for e in found]}
                for window, found in zip(setup.model.layer_groups, tables, strict=True)
            ],
        }
        print(json.dumps(report))
        return
    console = Console()
    console.print(constants_line(constants), highlight=False, soft_wrap=True)
    forced = config.scheduler.schedule
    for window, found in zip(setup.model.layer_groups, tables, strict=True):
        layers = sum(setup.model.window(layer) == window for layer in range(setup.model.num_layers))
        kind = "" if window is None else f", window of {window}"
        title = f"{new:,} new tokens, {cached:,} cached: one layer of {layers}{kind}"
        if not found:
            console.print(f"{title}: nothing travels", highlight=False)
            continue
        console.print(_table(title, found, found[0].schedule if forced == "auto" else forced))
    if any(tables):
        console.print(_LEGEND, highlight=False)


def constants_line(constants: CostConstants) -> str:
    """The constants of the cost model as rates, in one line."""
    parallel = f", {constants.parallelism:.1f} ranks compute at once" if constants.parallelism else ""
    overlap = f"{constants.hidden:.0%} of a ring's transfer overlaps with compute"
    links = f"{_link(constants.byte_s)}, collective {constants.message_s * 1e6:,.0f} µs"
    if constants.cross_byte_s != constants.byte_s:
        links += f"; between machines {_link(constants.cross_byte_s)}"
    reads, merges = (1e-9 / seconds for seconds in (constants.read_s, constants.copy_s))
    gflops = 1e-9 / constants.flop_s
    rate = f"{gflops:,.1f} GFLOP/s" if gflops < _TERA else f"{gflops / 1e3:,.1f} TFLOP/s"
    return (
        f"cost model: attention {rate}, keys read at {reads:,.1f} GB/s, "
        f"merged at {merges:,.1f} GB/s; {links}; {overlap}{parallel}"
    )


def _link(byte_s: float) -> str:
    """The rate of a link, unless ranks share memory."""
    return f"link {1e-9 / byte_s:,.1f} GB/s" if byte_s > _BY_REFERENCE else "ranks share memory"


def _as_json(e: Estimate) -> dict[str, object]:
    return {"schedule": e.schedule, "bytes": e.bytes, **e.time._asdict(), "seconds": e.seconds}


def _table(title: str, found: list[Estimate], chosen: str) -> Table:
    columns = ("schedule", "MB", "fixed", "compute", "transfer", "copies", "hidden", "ms")
    table = new_table(title, columns, left=("schedule",), no_wrap=True)
    for e in found:
        time = e.time
        parts = (time.fixed, time.compute, time.transfer, time.copies, -time.hidden, time.seconds)
        style = "bold" if e.schedule == chosen else ""
        name = f"{e.schedule} *" if e.schedule == chosen else e.schedule
        table.add_row(name, f"{e.bytes / 1e6:,.2f}", *map(_milliseconds, parts), style=style)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1e3, 2) + 0.0:,.2f}"  # + 0.0 turns -0.0 into 0.0
