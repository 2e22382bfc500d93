"""`longspan plan`: compares all layouts of a model on given hardware by predicted capacity and times.

It owns the options and the table; the planner computes the forecasts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from longspan.cli import plots
from longspan.cli.options import Json
from longspan.cli.serve_command import DTYPES, command_notes, serve_command, served
from longspan.cli.show import new_table
from longspan.config import ParallelConfig, require, require_choice
from longspan.config.option import option

if TYPE_CHECKING:
    from longspan.planner.deployment import Deployment
    from longspan.planner.forecast import Forecast, Interval, TrafficLoad

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="built-in name, folder, config.json, .gguf file or hub id; no weights needed",
        show_default=False,
    ),
]  # fmt: skip
HardwareName = Annotated[str, typer.Option("--hardware", help="name of the hardware, as in h200, or a .yaml file")]

_SHOWN = 30  # rows of the table
_MIN_WIDTH = 128  # characters of the table


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `plan`. The help of each field says what it means."""

    gpus: int = option(8, "number of devices")
    nodes: int | None = option(None, "machines with equally many of the devices; default: 8 devices per machine")
    context: int = option(131072, "tokens of a request's prompt")
    new: int | None = option(None, "last tokens of the prompt that are not in the prefix cache; default: all")
    output: int = option(256, "tokens generated for a request")
    concurrency: int | None = option(
        None, "concurrent requests; default: 1, or as many as fit for the objective throughput"
    )
    objective: str = option("e2e", "sort by e2e (time of a whole request), ttft, tpot, throughput or capacity")
    max_ttft: float | None = option(None, "maximum time to first token, in seconds")
    max_tpot: float | None = option(None, "maximum time per output token, in milliseconds")
    tp: int | None = option(None, "only layouts with this tp", name="tensor_parallel_size", short="-tp")
    pcp: int | None = option(None, "only layouts with this pcp", name="prefill_context_parallel_size", short="-pcp")
    dcp: int | None = option(None, "only layouts with this dcp", name="decode_context_parallel_size", short="-dcp")
    pp: int | None = option(None, "only layouts with this pp", name="pipeline_parallel_size", short="-pp")
    experts: bool = option(
        False, "split a mixture's experts over tp x pcp ranks, not tp alone", name="enable_expert_parallel"
    )
    dtype: str = option("bf16", "data type of activations and embedding: bf16, fp16 or fp32")
    weight_dtype: str | None = option(
        None, "data type of weights: bf16, fp8, int4, mxfp4 or fp32; default: the model's own"
    )
    kv_cache_dtype: str = option("auto", "data type of the KV cache: auto (that of --dtype), fp8 or int8")
    memory_fraction: float = option(
        0.9, "fraction of each device's memory for weights, workspace and KV cache together"
    )
    max_num_batched_tokens: int = option(8192, "new tokens per step over all ranks")
    price: float | None = option(
        None, "price of a device per hour, for a column of costs; default: that of the hardware file"
    )
    show_all: bool = option(False, "also show layouts that are not in the Pareto set or do not fit", name="all")
    plot: str | None = option(None, "SVG file for a plot of time per token over time to first token")

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "gpus", self.gpus, "must be at least 1", "give the number of devices")
        batched, fraction, price = self.max_num_batched_tokens, self.memory_fraction, self.price
        require(batched >= 1, "max_num_batched_tokens", batched, "must be at least 1", "give a number of tokens")
        require(0 < fraction <= 1, "memory_fraction", fraction, "must be in (0, 1]", "0.9 is the default")
        require(price is None or price >= 0, "price", price, "must not be negative", "give a price per hour")
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("kv_cache_dtype", self.kv_cache_dtype, tuple(dict.fromkeys(("auto", self.dtype, "fp8", "int8"))))
        valid = [n for n in range(1, self.gpus + 1) if self.gpus % n == 0]
        require(self.nodes is None or self.nodes in valid, "nodes", self.nodes,
                f"does not divide {self.gpus} devices evenly", f"use one of {', '.join(map(str, valid))}")  # fmt: skip

    @property
    def per_node(self) -> int:
        """Number of devices of a machine."""
        return min(self.gpus, 8) if self.nodes is None else self.gpus // self.nodes


def plan(model: Model, hardware: HardwareName, options: PlanOptions, as_json: Json = False) -> None:
    """Predict capacity and times of every valid layout, and print the command that starts the best one."""
    from longspan.planner.forecast import TrafficLoad
    from longspan.planner.layouts import FixedSizes, fast_enough, pareto_set, plan_layouts
    from longspan.planner.models import find_config

    plots.check_plot(options.plot)
    base = _base(model, hardware, options)
    alone = options.concurrency is None and options.objective != "throughput"
    load = TrafficLoad(options.context, options.new, options.output, 1 if alone else options.concurrency)
    fixed = FixedSizes(options.tp, options.pcp, options.dcp, options.pp)
    layouts = plan_layouts(base, options.gpus, fixed, load, options.objective)
    max_tpot = None if options.max_tpot is None else options.max_tpot / 1e3
    fast = fast_enough([one for one in layouts if one.running], options.max_ttft, max_tpot)
    found = _Plan(
        base, load, layouts, fast, pareto_set(fast, load, options.objective),
        _title(model, hardware, options), base.hardware.price_per_hour,
    )  # fmt: skip
    start = served(model, find_config(model), base.weights, options.dtype)
    commands = [
        serve_command(start, base, one, options.dtype, options.kv_cache_dtype, load.context + load.output)
        for one in layouts
    ]
    if options.plot is not None:
        plots.save(plots.layout_scatter(found.points, found.title), options.plot)
    if as_json:
        rows = [found.as_json(one, command) for one, command in zip(layouts, commands, strict=True)]
        print(json.dumps({
            "model": model, "hardware": hardware, "gpus": options.gpus, "context": options.context, "layouts": rows,
            "no_command": start.problem,
        }))  # fmt: skip
        return
    console = Console(stderr=True)
    console.width = max(console.width, _MIN_WIDTH)
    console.print(found.table(options.show_all))
    best = fast[0]
    lines = [f"no command: {start.problem}"] if start.problem else [commands[layouts.index(best)] or ""]
    for line in (*lines, *command_notes(base, best, load.context + load.output)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _title(model: str, hardware: str, options: PlanOptions) -> str:
    from longspan.weights.builtin import builtin_name

    name = builtin_name(model) or model
    return f"{name} on {options.gpus} x {hardware}: {options.context:,} tokens, by {options.objective}"


def _base(model: str, hardware: str, options: PlanOptions) -> Deployment:
    from longspan.planner.deployment import Deployment
    from longspan.planner.hardware import hardware as named
    from longspan.planner.models import find_model
    from longspan.weights.formats import element_bytes

    config, weights = find_model(model, options.dtype, options.weight_dtype)
    require(config.moe is not None or not options.experts, "enable_expert_parallel", True, f"{model} has no experts",
            "leave it out")  # fmt: skip
    stored = options.dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    machine = named(hardware)
    if options.price is not None:
        machine = replace(machine, price_per_hour=options.price)
    return Deployment(
        config, machine, ParallelConfig(enable_expert_parallel=options.experts), weights,
        int(element_bytes("kv_cache_dtype", stored)), memory_fraction=options.memory_fraction,
        gpus_per_node=options.per_node, max_num_batched_tokens=options.max_num_batched_tokens,
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """The forecasts and how they are shown."""

    base: Deployment
    load: TrafficLoad
    layouts: Sequence[Forecast]  # all, the best first
    fast: Sequence[Forecast]  # those that fit and are within the limits of time
    best: Sequence[Forecast]  # the Pareto set of `fast`
    title: str
    price: float  # price of a device per hour; 0: not known

    @property
    def points(self) -> list[plots.LayoutPoint]:
        """The points of the plot."""
        return [
            plots.LayoutPoint(one.parallel.short_name, one.ttft.seconds, one.tpot.seconds, one in self.best)
            for one in self.fast
        ]

    def cost(self, one: Forecast) -> float | None:
        """Price of a million output tokens; None if the price is not known or the layout does not fit."""
        if not (self.price and one.running):
            return None
        return self.price * 1e6 / (one.throughput_per_gpu * 3600)

    def as_json(self, one: Forecast, command: str | None) -> dict[str, Any]:
        """One layout as an object of `--json`."""
        return {
            "name": one.parallel.short_name, **dict(zip(("tp", "pcp", "dcp", "pp"), one.sizes, strict=True)),
            "fits": one.running > 0, "within_limits": one in self.fast, "pareto": one in self.best,
            "missing_gb": max(0.0, one.missing_bytes / 1e9), "capacity_tokens": one.capacity_tokens,
            "capacity_requests": one.requests, "running": one.running, "ttft": _span(one.ttft),
            "tpot": _span(one.tpot), "throughput_per_gpu": one.throughput_per_gpu,
            "price_per_million": self.cost(one), "command": command,
        }  # fmt: skip

    def table(self, show_all: bool) -> Table:
        """The table of the Pareto set, or of all layouts."""
        columns = ["layout", "KV tokens", "fit", "TTFT\ns", "TTFT\nbound by", "TTFT\nlink s", "TPOT\nms",
                   "TPOT\nbound by", "TPOT\nlink ms", "tok/s per\ndevice"]  # fmt: skip
        columns += ["price of\n1M tok"] if self.price else []
        left = ("layout", "TTFT\nbound by", "TPOT\nbound by")
        table = new_table(self.title, columns, left, no_wrap=True, caption=self._caption(show_all), box=SIMPLE_HEAD)
        shown = self.layouts if show_all else self.best
        for one in shown[:_SHOWN]:
            name = f"{one.parallel.short_name} *" if show_all and one in self.best else one.parallel.short_name
            if not one.running:
                table.add_row(name, f"lacks {one.missing_bytes / 1e9:,.1f} GB")
                continue
            cost = self.cost(one)
            table.add_row(
                name, f"{one.capacity_tokens:,}", f"{one.requests:,}", *_cells(one.ttft, 1), *_cells(one.tpot, 1e3),
                f"{one.throughput_per_gpu:,.1f}", *([] if cost is None else [f"{cost:,.2f}"]),
            )  # fmt: skip
        return table

    def _caption(self, show_all: bool) -> str:
        means = "fit: requests that fit; link: time of waiting for other ranks; tok/s: output tokens"
        if show_all:
            return f"{means}\n*: Pareto set: no other layout is better in TTFT, TPOT and the objective at once"
        running = sum(one.running > 0 for one in self.layouts)
        hidden = {
            "not in the Pareto set": len(self.fast) - len(self.best), "over the limits": running - len(self.fast),
            "too large for the devices": len(self.layouts) - running,
        }  # fmt: skip
        named = ", ".join(f"{count} {why}" for why, count in hidden.items() if count)
        return f"{means}\nhidden layouts: {named}; --all shows them" if named else means


def _span(span: Interval) -> dict[str, Any] | None:
    if not span.parts:
        return None
    return {"seconds": span.seconds, "bound": span.bound, "exposed": span.exposed, "parts": dict(span.parts)}


def _cells(span: Interval, unit: float) -> tuple[str, str, str]:
    return f"{span.seconds * unit:,.2f}", span.bound, f"{span.exposed * unit:,.2f}"
