"""`longspan plan`: every layout of a model on a machine, with what it would hold and how fast it would be.

It owns the options and what is shown; the planner decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from longspan.cli import plots
from longspan.cli.options import ExpertParallel, Json
from longspan.cli.show import new_table
from longspan.config import ParallelConfig, require

if TYPE_CHECKING:
    from longspan.planner.deployment import Deployment
    from longspan.planner.outlook import Load, Outlook, Span

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="built-in name, folder, config.json, .gguf file or hub id; no weights needed",
        show_default=False,
    ),
]  # fmt: skip
HardwareName = Annotated[str, typer.Option("--hardware", help="a machine's name, as in h200, or a .yaml file")]
Gpus = Annotated[int, typer.Option("--gpus", help="devices in all")]
Nodes = Annotated[int | None, typer.Option("--nodes", help="machines they are in; default: 8 devices a machine")]
Context = Annotated[int, typer.Option("--context", help="tokens of a request before its first output")]
New = Annotated[int | None, typer.Option("--new", help="last tokens of it that are not cached; default: all")]
Output = Annotated[int, typer.Option("--output", help="tokens generated for a request")]
Concurrency = Annotated[
    int | None, typer.Option("--concurrency", help="requests at once; default: 1, for throughput as many as fit")
]
Objective = Annotated[str, typer.Option("--objective", help="order: ttft, tpot, throughput or capacity")]
Tensor = Annotated[int | None, typer.Option("--tensor-parallel-size", "-tp", help="tp of all layouts; default: any")]
Prefill = Annotated[
    int | None, typer.Option("--prefill-context-parallel-size", "-pcp", help="pcp of all layouts; default: any")
]
Decode = Annotated[
    int | None, typer.Option("--decode-context-parallel-size", "-dcp", help="dcp of all layouts; default: any")
]
Pipeline = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "-pp", help="pp of all layouts; default: any")
]
Dtype = Annotated[str, typer.Option("--dtype", help="of activations and embedding: bf16, fp16 or fp32")]
WeightDtype = Annotated[
    str | None, typer.Option("--weight-dtype", help="bf16, fp8, int4, mxfp4, fp32; default: the model's own")
]
CacheDtype = Annotated[str, typer.Option("--kv-cache-dtype", help="auto, bf16, fp8, int8 or fp32")]
MemoryFraction = Annotated[float, typer.Option("--memory-fraction", help="of a device's memory that is used in all")]
BatchedTokens = Annotated[int, typer.Option("--max-num-batched-tokens", help="new tokens a step computes")]
Plot = Annotated[Path | None, typer.Option("--plot", help="SVG file of the best layouts against context")]

_SHOWN, _DRAWN, _LEAST_WIDTH = 30, 4, 110


def plan(
    model: Model,
    hardware: HardwareName,
    gpus: Gpus = 8,
    nodes: Nodes = None,
    context: Context = 131072,
    new: New = None,
    output: Output = 256,
    concurrency: Concurrency = None,
    objective: Objective = "ttft",
    tensor_parallel_size: Tensor = None,
    prefill_context_parallel_size: Prefill = None,
    decode_context_parallel_size: Decode = None,
    pipeline_parallel_size: Pipeline = None,
    enable_expert_parallel: ExpertParallel = False,
    dtype: Dtype = "bf16",
    weight_dtype: WeightDtype = None,
    kv_cache_dtype: CacheDtype = "auto",
    memory_fraction: MemoryFraction = 0.9,
    max_num_batched_tokens: BatchedTokens = 8192,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Every valid layout with capacity and times, the best first."""
    from longspan.planner.layouts import Fixed, plan_layouts
    from longspan.planner.outlook import Load

    plots.check_plot(plot)
    require(gpus >= 1, "gpus", gpus, "must be at least 1", "give the devices in all")
    require(max_num_batched_tokens >= 1, "max_num_batched_tokens", max_num_batched_tokens, "must be at least 1",
            "give tokens")  # fmt: skip
    require(0 < memory_fraction <= 1, "memory_fraction", memory_fraction, "is not in 0..1", "give 0.9 or so")
    base = _base(model, hardware, dtype, weight_dtype, kv_cache_dtype, enable_expert_parallel, _per_node(gpus, nodes),
                 memory_fraction, max_num_batched_tokens)  # fmt: skip
    if concurrency is None and objective != "throughput":
        concurrency = 1
    load = Load(context, new, output, concurrency)
    fixed = Fixed(tensor_parallel_size, prefill_context_parallel_size, decode_context_parallel_size,
                  pipeline_parallel_size)  # fmt: skip
    found = plan_layouts(base, gpus, fixed, load, objective)
    if plot is not None:
        lines = _lines(base, [one for one in found if one.running], load)
        plots.save(plots.layout_lines(lines, f"{model} on {gpus} x {hardware}"), plot)
    if as_json:
        rows = [_as_json(one, _command(model, base, one, kv_cache_dtype)) for one in found]
        print(json.dumps({"model": model, "hardware": hardware, "gpus": gpus, "context": context, "layouts": rows}))
        return
    console = Console(stderr=True)
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(_table(found, f"{model} on {gpus} x {hardware}: {context:,} tokens, by {objective}"))
    console.print(_command(model, base, found[0], kv_cache_dtype), soft_wrap=True, highlight=False)
    positions = base.model.max_position_embeddings
    if context + output > positions:
        console.print(f"{model} was made for {positions:,} positions", soft_wrap=True, highlight=False)


def _per_node(gpus: int, nodes: int | None) -> int:
    if nodes is None:
        return min(gpus, 8)
    valid = [n for n in range(1, gpus + 1) if gpus % n == 0]
    require(nodes in valid, "nodes", nodes, f"does not divide {gpus} devices evenly",
            f"use one of {', '.join(map(str, valid))}")  # fmt: skip
    return int(gpus / nodes)


def _base(
    model: str, hardware: str, dtype: str, weight_dtype: str | None, kv_dtype: str, experts: bool, per_node: int,
    fraction: float, batched: int,
) -> Deployment:  # fmt: skip
    from longspan.planner.deployment import Deployment
    from longspan.planner.hardware import hardware as machine
    from longspan.planner.models import find_model
    from longspan.weights.formats import element_bytes

    config, weights = find_model(model, dtype, weight_dtype)
    require(config.moe is not None or not experts, "enable_expert_parallel", True, f"{model} has no experts",
            "leave it out")  # fmt: skip
    stored = element_bytes("kv_cache_dtype", dtype if kv_dtype == "auto" else kv_dtype)
    require(stored.is_integer(), "kv_cache_dtype", kv_dtype, "no cache has it", "use auto, bf16, fp8 or fp32")
    return Deployment(
        config, machine(hardware), ParallelConfig(enable_expert_parallel=experts), weights, int(stored),
        memory_fraction=fraction, gpus_per_node=per_node, max_num_batched_tokens=batched,
    )  # fmt: skip


def _command(model: str, base: Deployment, one: Outlook, kv_dtype: str) -> str:
    """What starts the layout."""
    sizes = zip(("-tp", "-pcp", "-dcp", "-pp"), one.sizes, strict=True)
    options = [f"{name} {size}" for name, size in sizes if size != 1]
    if one.parallel.enable_expert_parallel:
        options.append("--enable-expert-parallel")
    if base.kv_element_bytes == 1:
        options.append(f"--kv-cache-dtype {kv_dtype}")
    options.append(f"--max-num-batched-tokens {base.max_num_batched_tokens}")
    options.append(f"--kv-cache-memory-bytes {max(0, math.floor(one.cache_bytes / 2**20))}M")
    return " ".join(["longspan serve", model, *options])


def _as_json(one: Outlook, command: str) -> dict[str, Any]:
    return {
        **dict(zip(("tp", "pcp", "dcp", "pp"), one.sizes, strict=True)),
        "fits": one.running > 0, "missing_gb": max(0.0, one.missing_bytes / 1e9),
        "capacity_tokens": one.capacity_tokens, "capacity_requests": one.requests, "running": one.running,
        "ttft": _span(one.ttft), "tpot": _span(one.tpot), "throughput_per_gpu": one.throughput_per_gpu,
        "command": command,
    }  # fmt: skip


def _span(span: Span) -> dict[str, Any] | None:
    if not span.parts:
        return None
    return {"seconds": span.seconds, "bound": span.bound, "exposed": span.exposed, "parts": dict(span.parts)}


def _table(found: Sequence[Outlook], title: str) -> Table:
    caption = "link: ranks wait for each other's bytes; tok/s: output a device"
    times = ("TTFT s", "bound", "link s", "TPOT ms", "bound", "link ms", "tok/s")
    columns = ("tp·pcp·dcp·pp", "KV tokens", "fit", *times)
    table = new_table(title, columns, left=("bound",), no_wrap=True, caption=caption, box=SIMPLE_HEAD)
    for one in found[:_SHOWN]:
        layout = "·".join(map(str, one.sizes))
        if one.running:
            cells = (*_cells(one.ttft, 1), *_cells(one.tpot, 1e3), f"{one.throughput_per_gpu:,.1f}")
            table.add_row(layout, f"{one.capacity_tokens:,}", f"{one.requests:,}", *cells)
        else:
            table.add_row(layout, f"lacks {one.missing_bytes / 1e9:,.1f} GB")
    return table


def _cells(span: Span, unit: float) -> tuple[str, str, str]:
    return f"{span.seconds * unit:,.2f}", span.bound, f"{span.exposed * unit:,.2f}"


def _lines(base: Deployment, found: Sequence[Outlook], load: Load) -> dict[str, list[plots.Point]]:
    """What is drawn of the first layouts, at lengths around the one asked for."""
    from longspan.planner.outlook import Load, outlook

    contexts = [max(1, math.floor(load.context * 2.0**power)) for power in range(-4, 4)]
    lines: dict[str, list[plots.Point]] = {}
    for one in found[:_DRAWN]:
        deployed = replace(base, parallel=one.parallel)
        at = [(context, outlook(deployed, Load(context, None, load.output))) for context in contexts]
        lines[one.parallel.name] = [plots.Point(context, o.ttft.seconds, o.requests) for context, o in at]
    return lines
