"""`longspan bench latency|throughput|mixed|scheduler`: benchmarks of the engine on this machine.

It owns the options and the tables. Tables and progress go to stderr; with `--json` one object goes to stdout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from longspan.cli.options import Json, PageSize
from longspan.cli.show import new_table, progress_bar, step_bar
from longspan.config import EngineConfig, ParallelConfig, parse_integers, require, require_choice

InputLen = Annotated[int, typer.Option("--input-len", help="tokens of a prompt")]
OutputLen = Annotated[int, typer.Option("--output-len", help="tokens generated for a request")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="requests in the batch")]
Iterations = Annotated[int, typer.Option("--iterations", help="measured runs")]
Warmup = Annotated[int, typer.Option("--warmup", help="runs before the measured ones")]
Compare = Annotated[
    str | None, typer.Option("--compare", help="also measure `transformers` on the same weights, in turn")
]
CompareLayout = Annotated[
    str | None,
    typer.Option("--compare-layout", help="also measure a second layout in turn, as in tp=1,pcp=2,dcp=1,pp=1"),
]
NumPrompts = Annotated[int, typer.Option("--num-prompts", help="number of requests")]
Chats = Annotated[int, typer.Option("--chats", help="number of short requests")]
ChatLen = Annotated[
    int, typer.Option("--chat-len", help="mean tokens of a short request's prompt; lengths are within ±50 %")
]
LongContexts = Annotated[int, typer.Option("--contexts", help="number of long requests")]
ContextLen = Annotated[int, typer.Option("--context-len", help="tokens of a long request's prompt")]
Running = Annotated[int, typer.Option("--running", help="decoding requests")]
Contexts = Annotated[str, typer.Option("--context", help="context lengths, as in 1024,65536")]
Shards = Annotated[int, typer.Option("--shards", help="shards that hold the pages")]
Steps = Annotated[int, typer.Option("--steps", help="measured steps for each context length")]


def latency(
    config: EngineConfig,
    input_len: InputLen = 1024,
    output_len: OutputLen = 32,
    batch_size: BatchSize = 1,
    iterations: Iterations = 3,
    warmup: Warmup = 1,
    compare: Compare = None,
    compare_layout: CompareLayout = None,
    as_json: Json = False,
) -> None:
    """Measure time to first token, prefill rate and decode rate of one batch."""
    _at_least(1, input_len=input_len, output_len=output_len, batch_size=batch_size, iterations=iterations)
    _at_least(0, warmup=warmup)
    if compare is not None:
        require_choice("compare", compare, ("transformers",))
    from longspan.bench.contestants import LongspanContestant, TransformersContestant
    from longspan.bench.latency import BatchLoad, run_latency
    from longspan.engine.cores import threads_per_rank
    from longspan.engine.setup import resolve

    config = replace(config, cache=replace(config.cache, enable_prefix_caching=False))
    setup = resolve(config)
    contestants: dict[str, LongspanContestant | TransformersContestant] = {"longspan": LongspanContestant(config)}
    if compare_layout is not None:
        other = replace(config, parallel=ParallelConfig.parse("compare_layout", compare_layout))
        contestants[compare_layout] = LongspanContestant(other)
    if compare is not None:
        contestants[compare] = TransformersContestant(config, threads_per_rank(setup.config) * setup.grid.world_size)
    load = BatchLoad(input_len, output_len, batch_size, iterations, warmup, config.seed, setup.model.vocab_size)
    console = Console(stderr=True)
    with step_bar(console, len(contestants) * (1 + warmup + iterations)) as show:
        report = run_latency(load, contestants, show)
    _show_rates(console, report, load.batch_size)
    _print_json(as_json, {"model": config.model, "input_len": input_len, "batch_size": batch_size, **report})


def throughput(
    config: EngineConfig,
    num_prompts: NumPrompts = 32,
    input_len: InputLen = 256,
    output_len: OutputLen = 64,
    as_json: Json = False,
) -> None:
    """Measure the throughput of continuous batching with random lengths, within ±50 % of the means."""
    _at_least(1, num_prompts=num_prompts, input_len=input_len, output_len=output_len)
    from longspan.bench.throughput import run_throughput
    from longspan.engine.engine import Engine

    console = Console(stderr=True)
    with console.status(f"loading {config.model}"):
        engine = Engine(config)
    with engine, progress_bar(console, "requests", num_prompts) as on_done:
        report = run_throughput(engine, num_prompts, input_len, output_len, config.seed, on_done)
    _show_table(console, f"Throughput of {config.model}", [report])
    _print_json(as_json, {"model": config.model, **report})


def mixed(
    config: EngineConfig,
    chats: Chats = 64,
    chat_len: ChatLen = 128,
    contexts: LongContexts = 2,
    context_len: ContextLen = 6000,
    output_len: OutputLen = 64,
    iterations: Iterations = 1,
    as_json: Json = False,
) -> None:
    """Measure short chats and long contexts together, with three placements: by length, all spread, and all local."""
    _at_least(1, chats=chats, chat_len=chat_len - 1, contexts=contexts, context_len=context_len)
    _at_least(1, output_len=output_len - 1, iterations=iterations)
    dcp = config.parallel.decode_context_parallel_size
    require(dcp == 1, "decode_context_parallel_size", dcp, "leaves no local placement to compare with", "use -pcp")
    from longspan.bench.mixed import MixedLoad, run_mixed

    load = MixedLoad(chats, chat_len, contexts, context_len, output_len, config.seed)
    console = Console(stderr=True)
    with step_bar(console) as show:
        rows = run_mixed(config, load, iterations, show)
    _show_table(console, f"{chats} chats and {contexts} contexts of {context_len:,} tokens", rows)
    _print_json(as_json, {"model": config.model, "rows": rows})


def scheduler(
    running: Running = 256,
    context: Contexts = "1024,8192,65536,524288",
    shards: Shards = 2,
    page_size: PageSize = 16,
    steps: Steps = 100,
    as_json: Json = False,
) -> None:
    """Measure the time that the scheduler takes for a decode step. No model is run."""
    contexts = parse_integers("context", context)
    _at_least(1, running=running, shards=shards, steps=steps, context=min(contexts), page_size=page_size)
    from longspan.bench.scheduling import run_scheduling

    console = Console(stderr=True)
    with console.status("starting") as status:
        rows = run_scheduling(running, contexts, shards, page_size, steps, status.update)
    _show_table(console, f"Scheduler, µs per step (median of {steps})", rows)
    _print_json(as_json, {"shards": shards, "page_size": page_size, "rows": rows})


def _at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        require(value >= least, name, value, f"must be at least {least}", f"give {least} or more")


def _show_rates(console: Console, report: Mapping[str, Any], batch_size: int) -> None:
    columns = ("", "first token, s", "prefill, tokens/s", "decode, tokens/s")
    table = new_table(f"Latency, batch of {batch_size}: median (minimum to maximum)", columns)
    for name, rates in report.items():
        if name == "ratio":
            continue
        table.add_row(name, *(_spread(rates[key]) for key in ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")))
    for other, ratio in report.get("ratio", {}).items():
        decode = f"{ratio['decode']:.2f}x" if ratio["decode"] else "-"
        table.add_row(f"longspan / {other}", "", f"{ratio['prefill']:.2f}x", decode)
    console.print(table)
    for name, rates in report.items():
        if "speculation" in rates:
            length, shares = rates["speculation"].values()
            accepted = ", ".join(f"{share:.0%}" for share in shares)
            console.print(f"{name}: {length:.2f} tokens a step with drafts; accepted by position: {accepted}")


def _spread(values: Mapping[str, float] | None) -> str:
    return f"{values['median']:,.2f} ({values['min']:,.2f} to {values['max']:,.2f})" if values else "-"


def _show_table(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = new_table(title, [column.replace("_", " ") for column in rows[0]])
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _print_json(as_json: bool, report: Mapping[str, Any]) -> None:
    if as_json:
        print(json.dumps(report))
