"""`longspan simulate`: replays a trace on simulated engines and reports throughput and latencies.

It owns the options, the tables and the files. Tables and progress go to stderr, the object of `--json` to stdout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from longspan.cli import plots
from longspan.cli.bench_serve import show_reports
from longspan.cli.options import Json, LocalContext, NumSeqs, PrefixCaching, Schedule
from longspan.cli.show import new_table, progress_bar
from longspan.config import ParallelConfig, SchedulerConfig, parse_bytes, require

if TYPE_CHECKING:
    from longspan.planner.deployment import Deployment
    from longspan.planner.simulate.instance import InstanceConfig
    from longspan.planner.simulate.run import Simulation
    from longspan.planner.simulate.trace_requests import TraceRequest
    from longspan.scheduler.limits import Limits

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="folder, hub id or built-in name", show_default=False)]
HardwareName = Annotated[
    str, typer.Option("--hardware", help="name of the hardware, as in h200, or a .yaml file, as calibrate writes it")
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="layout of an instance, as in tp=8,dcp=8; also pcp and pp; default: the fewest devices that suffice",
    ),
]
Trace = Annotated[str, typer.Option("--trace", help="trace file, as for bench serve --dataset trace")]
Instances = Annotated[int, typer.Option("--instances", help="number of engines; each request goes to one")]
BatchedTokens = Annotated[int, typer.Option("--max-num-batched-tokens", help="new tokens per step over all ranks")]
NumRequests = Annotated[
    int | None, typer.Option("--num-requests", help="only this many first requests of the trace; default: all")
]
TimeScale = Annotated[
    float, typer.Option("--time-scale", help="factor for the gaps between requests: 0.5 doubles the load")
]
MaxInputLen = Annotated[int | None, typer.Option("--max-input-len", help="tokens to which longer prompts are cut")]
ModelLength = Annotated[
    int | None,
    typer.Option("--max-model-len", help="tokens of prompt and completion; default: those of the longest request"),
]
PageSize = Annotated[int, typer.Option("--page-size", help="tokens per KV page; smaller pages take longer to simulate")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="data type of activations, and of weights that are not quantised: bf16, fp32 ...")
]
WeightDtype = Annotated[
    str | None,
    typer.Option("--weight-dtype", help="data type of weights: bf16, fp8, int4 ...; default: the model's own"),
]
KVDtype = Annotated[
    str | None, typer.Option("--kv-cache-dtype", help="data type of the KV cache; default: that of --dtype")
]
CacheMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-memory-bytes", help="KV cache per rank in bytes; default: what is left of --memory-fraction"
    ),
]
MemoryFraction = Annotated[
    float,
    typer.Option(
        "--memory-fraction", help="fraction of each device's memory for weights, workspace and KV cache together"
    ),
]
GpusPerNode = Annotated[int, typer.Option("--gpus-per-node", help="devices per machine")]
Plot = Annotated[str | None, typer.Option("--plot", help="SVG file for a plot of KV pages in use over time")]


def simulate(
    model: ModelName,
    hardware: HardwareName,
    trace: Trace,
    layout: Layout = None,
    instances: Instances = 1,
    num_requests: NumRequests = None,
    time_scale: TimeScale = 1.0,
    max_input_len: MaxInputLen = None,
    max_model_len: ModelLength = None,
    page_size: PageSize = 512,
    max_num_batched_tokens: BatchedTokens = 8192,
    max_num_seqs: NumSeqs = None,
    local_context: LocalContext = None,
    schedule: Schedule = "auto",
    enable_prefix_caching: PrefixCaching = True,
    dtype: Dtype = "bf16",
    weight_dtype: WeightDtype = None,
    kv_cache_dtype: KVDtype = None,
    kv_cache_memory_bytes: CacheMemory = None,
    memory_fraction: MemoryFraction = 0.9,
    gpus_per_node: GpusPerNode = 8,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Replay a trace on simulated engines: the real scheduler and cache, with predicted step times."""
    from longspan.planner.deployment import Deployment
    from longspan.planner.hardware import hardware as machine
    from longspan.planner.models import find_model
    from longspan.planner.simulate.setup import instance_config, limits_of
    from longspan.planner.simulate.trace_requests import read_requests
    from longspan.weights.formats import element_bytes

    require(instances >= 1, "instances", instances, "must be at least 1", "give the number of engines")
    require(page_size >= 1, "page_size", page_size, "must be at least 1", "512 is the default")
    plots.check_plot(plot)
    scheduler = SchedulerConfig(
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        local_context=local_context, schedule=schedule)  # fmt: skip
    requests = read_requests(trace, num_requests, time_scale, max_input_len)
    shape, weights = find_model(model, dtype, weight_dtype)
    deployment = Deployment(
        shape, machine(hardware), ParallelConfig(), weights,
        int(element_bytes("kv_cache_dtype", kv_cache_dtype or dtype)), page_size, memory_fraction, gpus_per_node,
        scheduler.step_tokens, scheduler.running_limit,
    )  # fmt: skip
    deployment = replace(deployment, parallel=_parallel(layout, deployment, requests))
    memory = None if kv_cache_memory_bytes is None else parse_bytes("kv_cache_memory_bytes", kv_cache_memory_bytes)
    config = instance_config(deployment, scheduler, memory, enable_prefix_caching)
    result = _play(config, requests, instances, limits_of(config, max_model_len, requests))
    title = f"{model} on {instances} x {deployment.parallel.short_name} of {hardware}, simulated"
    _show(title, result, notes := _notes(deployment, requests, num_requests))
    if as_json:
        print(json.dumps({
            "model": model, "hardware": hardware, "layout": deployment.parallel.name, "trace": trace,
            "instances": instances, "num_requests": len(requests), "time_scale": time_scale,
            "capacity_tokens": sum(config.pages_per_shard) * page_size, "notes": notes, **asdict(result),
        }))  # fmt: skip
    if plot is not None:
        plots.save(plots.memory_map(result.memory, title), plot)


def _parallel(layout: str | None, base: Deployment, requests: Sequence[TraceRequest]) -> ParallelConfig:
    """The given layout, or the smallest one in which the longest request fits."""
    from longspan.planner.layouts import smallest_layout

    if layout is not None:
        return ParallelConfig.parse("layout", layout)
    return smallest_layout(base, max(request.prompt_tokens + request.max_tokens for request in requests))


def _play(config: InstanceConfig, requests: Sequence[TraceRequest], instances: int, limits: Limits) -> Simulation:
    from longspan.planner.simulate.run import simulate as play

    with progress_bar(Console(stderr=True), "requests", len(requests)) as on_done:
        return play(config, requests, instances, limits, on_done)


def _notes(deployment: Deployment, requests: Sequence[TraceRequest], asked: int | None) -> list[str]:
    """Notes on results that may be misleading."""
    positions = deployment.model.max_position_embeddings
    found = len(requests)
    beyond = sum(request.prompt_tokens + request.max_tokens > positions for request in requests)
    return [
        *([f"the trace has only {found} of {asked} requests"] if asked and found < asked else []),
        *([f"{beyond} requests exceed the model's {positions:,} positions"] if beyond else []),
    ]


def _show(title: str, result: Simulation, notes: Sequence[str]) -> None:
    console = Console(stderr=True)
    show_reports(console, title, [result.report], notes)
    columns = ("instance", "requests", "mean", "mean of the fullest shard", "peak of the fullest shard")
    table = new_table("KV pages in use, as a fraction of each shard", columns)
    pages = result.memory.pages_per_shard
    for number, used in enumerate(result.memory.used):
        means = [fmean(row) / size for row, size in zip(used, pages, strict=True)]
        peak = max(most / size for most, size in zip(result.memory.peak[number], pages, strict=True))
        cells = (f"{part:.1%}" for part in (fmean(means), max(means), peak))
        table.add_row(str(number), str(result.requests_by_instance[number]), *cells)
    console.print(table)
    known = result.cached_tokens / max(result.report.prompt_tokens, 1)
    console.print(
        f"{result.steps:,} steps, {result.preemptions:,} preemptions; {known:.1%} of the prompts' tokens were cached",
        highlight=False,
    )
