"""`longspan bench serve`: throughput and latencies of any OpenAI-compatible server under load.

It owns the options, the tables and the files. Tables and progress go to stderr, the object of `--json` to stdout.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from longspan.cli import plots
from longspan.cli.options import Json
from longspan.cli.show import new_table, progress_bar
from longspan.config import parse_integers, require
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.bench.serving.client import Target
    from longspan.bench.serving.dataset import Dataset
    from longspan.bench.serving.report import RunReport

_METRICS = {"first token": "ttft_s", "per output token": "tpot_s", "between chunks": "itl_s", "whole request": "e2e_s"}
_BUSY = 0.8  # fraction of a core from which on the client itself may be the bottleneck

BaseUrl = Annotated[str, typer.Option("--base-url", help="the server's root, as in http://127.0.0.1:8000")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="model name to request; default: the first that the server lists")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="API key, sent as bearer token")]
Endpoint = Annotated[str, typer.Option("--endpoint", help="API to call: completions or chat")]
DatasetName = Annotated[str, typer.Option("--dataset", help="source of prompts: random, sharegpt, gsm8k or trace")]
DatasetPath = Annotated[str | None, typer.Option("--dataset-path", help="file of the dataset; random needs none")]
NumPrompts = Annotated[int, typer.Option("--num-prompts", help="requests of a run")]
InputLen = Annotated[int, typer.Option("--input-len", help="tokens of a random prompt, without the shared prefix")]
OutputLen = Annotated[
    int | None,
    typer.Option("--output-len", help="tokens to generate for a request; default: 128, or what the trace says"),
]
Vary = Annotated[
    float, typer.Option("--vary", help="random lengths differ from the mean by up to this fraction, as in 0.5")
]
PrefixLen = Annotated[int, typer.Option("--prefix-len", help="tokens of a prefix that all random prompts share")]
Rate = Annotated[
    float | None,
    typer.Option("--request-rate", help="mean arrivals per second (a Poisson process); default: all at once"),
]
Concurrency = Annotated[
    str | None,
    typer.Option("--concurrency", help="maximum requests at once; 1,8,32 makes three runs; default: no limit"),
]
Speedup = Annotated[float, typer.Option("--speedup", help="factor by which a trace is sent faster than recorded")]
MaxInputLen = Annotated[
    int | None, typer.Option("--max-input-len", help="tokens to which longer prompts of a trace are cut")
]
LoadSeed = Annotated[int, typer.Option("--seed", help="random seed of prompts, lengths and arrivals")]
VocabSize = Annotated[int, typer.Option("--vocab-size", help="random token ids are less than this")]
TextPrompts = Annotated[
    bool, typer.Option("--text-prompts", help="send random prompts as words instead of token ids; always so for chat")
]
Temperature = Annotated[float, typer.Option("--temperature", help="sampling temperature; 0 is greedy")]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos/--no-ignore-eos", help="send ignore_eos, so that outputs have the requested length"),
]
Timeout = Annotated[float, typer.Option("--timeout", help="seconds that a request may take")]
Plot = Annotated[str | None, typer.Option("--plot", help="SVG file for latency against concurrency")]


def serve(
    base_url: BaseUrl = "http://127.0.0.1:8000",
    model: ModelName = None,
    api_key: ApiKey = None,
    endpoint: Endpoint = "completions",
    dataset: DatasetName = "random",
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = 100,
    input_len: InputLen = 1024,
    output_len: OutputLen = None,
    vary: Vary = 0.0,
    prefix_len: PrefixLen = 0,
    request_rate: Rate = None,
    concurrency: Concurrency = None,
    speedup: Speedup = 1.0,
    max_input_len: MaxInputLen = None,
    seed: LoadSeed = 0,
    vocab_size: VocabSize = 30000,
    text_prompts: TextPrompts = False,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = True,
    timeout: Timeout = 600.0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure throughput and latencies of an OpenAI-compatible server under load."""
    from longspan.bench.serving.client import Target
    from longspan.bench.serving.dataset import RequestLoad, open_dataset

    load = RequestLoad(
        dataset, dataset_path, num_prompts, input_len, output_len, vary, prefix_len, request_rate, speedup,
        max_input_len, seed, vocab_size, text_prompts or endpoint == "chat",
    )  # fmt: skip
    target = Target(base_url, model or "", endpoint, temperature, ignore_eos, timeout, api_key)
    limits = _limits(concurrency)
    plots.check_plot(plot)
    prompts = open_dataset(load)
    if model is None:
        target = replace(target, model=asyncio.run(target.first_model()))
    console = Console(stderr=True)
    reports = _run_all(console, target, prompts, limits)
    notes = [*prompts.notes(len(limits)), *_warnings(reports)]
    show_reports(console, f"{target.model} at {target.root}", reports, notes)
    if as_json:
        runs = [asdict(report) for report in reports]
        print(json.dumps({**target.options(), **asdict(load), "concurrency": limits, "notes": notes, "runs": runs}))
    if plot is not None:
        plots.save(plots.latency_lines(reports, target.model), plot)


def _limits(concurrency: str | None) -> tuple[int | None, ...]:
    if concurrency is None:
        return (None,)
    limits = parse_integers("concurrency", concurrency)
    require(min(limits) >= 1, "concurrency", concurrency, "must be at least 1", "give numbers of requests")
    return limits


def _run_all(console: Console, target: Target, prompts: Dataset, limits: Sequence[int | None]) -> list[RunReport]:
    """Make a run for each limit. Raises `ConfigError` if no request of the first run succeeds."""
    from longspan.bench.serving.client import run_load
    from longspan.bench.serving.report import summarise

    reports: list[RunReport] = []
    for number, limit in enumerate(limits):
        with progress_bar(console, "requests" if limit is None else f"requests, {limit} at once") as on_done:
            finished = asyncio.run(run_load(target, prompts.requests(number), limit, on_done))
        reports.append(summarise(finished, limit))
        if not any(report.completed for report in reports):
            seen = "; ".join(f"{error.count} x {error.kind}: {error.example}" for error in reports[-1].errors)
            problem = f"none of {reports[-1].failed} requests succeeded ({seen})"
            raise ConfigError("base_url", target.root, problem, "check the server, the model and the options")
    return reports


def _warnings(reports: Sequence[RunReport]) -> list[str]:
    """Notes on results that may be misleading."""
    busy = max(report.client_cpu for report in reports)
    short = sum(report.short_outputs for report in reports)
    counted = sum(report.counted_requests for report in reports)
    return [
        *([f"{short} outputs are shorter than requested"] if short else []),
        *([f"{counted} responses had no usage: chunks were counted as tokens"] if counted else []),
        *([f"the client used {busy:.0%} of a core and may have been the bottleneck"] if busy >= _BUSY else []),
    ]


def show_reports(console: Console, title: str, reports: Sequence[RunReport], notes: Sequence[str]) -> None:
    """Print throughput, latencies, errors and notes of runs."""
    counted = ("at once", "completed", "failed", "seconds", "requests/s", "output tokens/s", "all tokens/s")
    rates = new_table(title, counted)
    latencies = new_table("Latency, ms", ("at once", "", "mean", "median", "p90", "p99"))
    for report in reports:
        limit = "all" if report.concurrency is None else str(report.concurrency)
        numbers = (report.duration_s, report.requests_per_s, report.output_tokens_per_s, report.total_tokens_per_s)
        rates.add_row(limit, str(report.completed), str(report.failed), *(f"{number:,.2f}" for number in numbers))
        for name, field in _METRICS.items():
            spread = getattr(report, field)
            cells = [f"{value * 1000:,.2f}" for value in asdict(spread).values()] if spread else ["-"] * 4
            latencies.add_row(limit, name, *cells, end_section=field == "e2e_s")
    console.print(rates, latencies, sep="\n")
    for report in reports:
        for error in report.errors:
            console.print(f"{error.count} x {error.kind}: {error.example}", markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)
