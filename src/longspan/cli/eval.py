"""`longspan eval`: what a model scores on a benchmark's problems.

It owns the options and what is shown; tables and progress go to stderr, and with `--json` one object goes to stdout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from longspan.cli.options import Json, engine_config
from longspan.config import EngineConfig, require
from longspan.errors import ConfigError
from longspan.evaluate.asking import Answer, Batch, OnAnswer
from longspan.evaluate.gsm8k import STOP_STRINGS, Scored, exact_match, prompt_of, score, select

Data = Annotated[str, typer.Option("--data", help="GSM8K problems as JSON lines of question and answer")]
Shots = Annotated[int, typer.Option("--shots", help="solved examples in every prompt")]
ShotsData = Annotated[
    str | None, typer.Option("--shots-data", help="file whose last problems are the examples; default: --data")
]
Limit = Annotated[int | None, typer.Option("--limit", help="problems to score, from the first; default: all")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="tokens of an answer at most")]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="OpenAI-compatible server to ask; MODEL is its name there, without engine options"),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="key for --base-url")]
Concurrency = Annotated[int, typer.Option("--concurrency", help="requests in flight to --base-url")]
Output = Annotated[str | None, typer.Option("--output", help="JSON lines file for every prompt, answer and verdict")]


def gsm8k(
    config: EngineConfig,
    data: Data,
    shots: Shots = 5,
    shots_data: ShotsData = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 256,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    concurrency: Concurrency = 32,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Exact match on grade-school maths problems, in this process or through a server."""
    require(max_tokens >= 1, "max_tokens", max_tokens, "must be at least 1", "256 is the default")
    examples, problems = select(data, shots, shots_data, limit)
    if output is not None:
        _writing(output, Path(output).touch)  # before the work, rather than after it
    batch = Batch(tuple(prompt_of(examples, problem) for problem in problems), max_tokens, STOP_STRINGS)
    console = Console(stderr=True)
    if base_url is None:
        answers, seconds = _ask_in_process(config, batch, console)
    else:
        from longspan.evaluate.endpoint import Endpoint

        plain = config == engine_config(config.model)
        require(plain, "base_url", base_url, "is a server with options of its own", "leave the engine's options out")
        endpoint = Endpoint(base_url, config.model, api_key, concurrency)
        answers, seconds = _timed(endpoint.ask, batch, console)
    scored = [score(*each) for each in zip(problems, batch.prompts, (a.text for a in answers), strict=True)]
    report = {"model": config.model, "shots": shots, **_report(scored, answers, seconds)}
    if output is not None:
        lines = "".join(f"{json.dumps(asdict(each))}\n" for each in scored)
        _writing(output, lambda: Path(output).write_text(lines, encoding="utf-8"))
    _show(console, report)
    if as_json:
        print(json.dumps(report))


def _ask_in_process(config: EngineConfig, batch: Batch, console: Console) -> tuple[list[Answer], float]:
    from longspan.evaluate.in_process import ask_model
    from longspan.llm import LLM  # brings PyTorch: options and data are checked before

    with console.status(f"loading {config.model}"):
        llm = LLM.from_config(config)
    with llm:
        return _timed(lambda batch, on_answer: ask_model(llm, batch, on_answer), batch, console)


def _timed(
    ask: Callable[[Batch, OnAnswer], list[Answer]], batch: Batch, console: Console
) -> tuple[list[Answer], float]:
    """The answers and the seconds they took, with a bar that counts them."""
    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("problems", total=len(batch.prompts))
        started = time.perf_counter()
        answers = ask(batch, lambda: progress.advance(task))
        return answers, time.perf_counter() - started


def _report(scored: Sequence[Scored], answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    counts = [answer.tokens for answer in answers if answer.tokens is not None]
    tokens = sum(counts) if len(counts) == len(answers) else None
    return {
        "problems": len(scored),
        "strict_match": asdict(exact_match([each.correct["strict"] for each in scored])),
        "flexible_extract": asdict(exact_match([each.correct["flexible"] for each in scored])),
        "seconds": seconds,
        "output_tokens": tokens,
        "output_tokens_per_s": None if tokens is None else tokens / seconds,
    }


def _writing(path: str, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError("output", path, f"cannot be written ({error.strerror})", "give a file's path") from error


def _show(console: Console, report: Mapping[str, Any]) -> None:
    table = Table(title=f"GSM8K, {report['shots']} shots: {report['model']}")
    for column in ("", "exact match", "standard error"):
        table.add_column(column, justify="right" if column else "left")
    for name, key in (("strict match", "strict_match"), ("flexible extract", "flexible_extract")):
        error = report[key]["standard_error"]
        table.add_row(name, f"{report[key]['exact_match']:.4f}", "-" if error is None else f"{error:.4f}")
    console.print(table)
    rate = report["output_tokens_per_s"]
    speed = "tokens not counted by the server" if rate is None else f"{rate:,.1f} output tokens/s"
    console.print(f"{report['problems']:,} problems in {report['seconds']:,.1f} s, {speed}", highlight=False)
