"""`longspan bench schedules`: the times of all schedules on the same workloads, and the regret of the automatic choice.

It owns the options, the table and the files. Tables and progress go to stderr; with `--json` one object goes to stdout.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from longspan.cli import plots
from longspan.cli.options import Json
from longspan.cli.show import new_table
from longspan.config import ParallelConfig, parse_integers, require, require_choice
from longspan.errors import ConfigError
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import check_heads

if TYPE_CHECKING:
    from longspan.bench.schedules import CellResult

_WIDTH = 150  # characters of the table
_Q_HEADS = 8  # query heads of every head shape
NewList = Annotated[str, typer.Option("--new", help="new tokens of a step, a case for each number, as in 1,64")]
CachedList = Annotated[str, typer.Option("--cached", help="cached tokens, a case for each number")]
Layouts = Annotated[str, typer.Option("--layouts", help="tp.pcp.dcp of each layout, as in 1.2.1,2.2.2")]
ExecutorName = Annotated[str, typer.Option("--executor", help="threads or processes: how ranks run")]
Iterations = Annotated[int, typer.Option("--iterations", help="measured repetitions of each schedule")]
Plot = Annotated[str | None, typer.Option("--plot", help="SVG file for a map of the fastest schedules")]


def schedules(
    new: NewList = "1,8,64,512",
    cached: CachedList = "256,2048,16384",
    layouts: Layouts = "1.2.1,1.4.1,2.2.2",
    executor: ExecutorName = "threads",
    iterations: Iterations = 7,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure time and bytes of every schedule, and the regret of the automatic choice."""
    require_choice("executor", executor, ("threads", "processes"))
    require(iterations >= 1, "iterations", iterations, "must be at least 1", "give 1 or more")
    sizes = [_layout(text) for text in layouts.split(",")]
    lengths = parse_integers("new", new), parse_integers("cached", cached)
    for name, found in zip(("new", "cached"), lengths, strict=True):
        require(min(found) >= 1, name, min(found), "must be at least 1", "give numbers of tokens")
    plots.check_plot(plot)
    from longspan.bench.schedules import HEAD_SHAPES, ScheduleCell, run_attention

    cells = [
        ScheduleCell(heads, *size, new_tokens, cached_tokens)
        for heads in HEAD_SHAPES for size in sizes for new_tokens in lengths[0] for cached_tokens in lengths[1]
    ]  # fmt: skip
    console = Console(stderr=True, width=_WIDTH)
    with console.status("starting") as status:
        results = run_attention(executor, cells, iterations, status.update)
    console.print(_table(results))
    regrets = [result.regret for result in results]
    console.print(f"regret of the automatic choice: median {median(regrets):.1%}, worst {max(regrets):.1%}")
    if plot is not None:
        plots.save(plots.schedule_map(results, f"Fastest schedule ({executor})"), plot)
    if as_json:
        print(json.dumps({"median_regret": median(regrets), "worst_regret": max(regrets), "cells": _rows(results)}))


def _layout(text: str) -> tuple[int, int, int]:
    sizes = text.split(".")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError("layouts", text, "is not a layout", "write it as tp.pcp.dcp, as in 2.2.2")
    tp, pcp, dcp = map(int, sizes)
    check_heads(Grid(ParallelConfig(tp, pcp, dcp)), _Q_HEADS)
    return tp, pcp, dcp


def _rows(results: list[CellResult]) -> list[dict[str, Any]]:
    return [
        {
            "heads": r.cell.heads.name, "tp": r.cell.tp, "pcp": r.cell.pcp, "dcp": r.cell.dcp, "new": r.cell.new,
            "cached": r.cell.cached, "chosen": r.chosen, "best": r.best.schedule, "regret": r.regret,
            "schedules": [asdict(timing) for timing in r.timings],
        }
        for r in results
    ]  # fmt: skip


def _table(results: list[CellResult]) -> Table:
    columns = ("heads", "tp.pcp.dcp", "new", "cached", *(timing.schedule for timing in results[0].timings), "regret")
    table = new_table(
        "Milliseconds per layer; *: the fastest, >: the automatic choice, regret: how much slower it is",
        columns,
        left=("heads",),
        no_wrap=True,
    )
    for r in results:
        times = (
            f"{'>' if t.schedule == r.chosen else ''}{'*' if t is r.best else ''}{t.seconds * 1e3:.2f}"
            for t in r.timings
        )
        layout = f"{r.cell.tp}.{r.cell.pcp}.{r.cell.dcp}"
        table.add_row(r.cell.heads.name, layout, f"{r.cell.new:,}", f"{r.cell.cached:,}", *times, f"{r.regret:.1%}")
    return table
