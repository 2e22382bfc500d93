"""`longspan calibrate`: measures the constants of this machine for the planner, and checks its predictions.

It owns the options and the tables. Progress and tables go to stderr, the constants to a file or to stdout.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from longspan.cli.options import Json
from longspan.cli.show import new_table
from longspan.config import require, require_choice
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.planner.hardware import Hardware
    from longspan.planner.simulate.check import Checks

Output = Annotated[str | None, typer.Option("--output", help="YAML file to write, for --hardware; default: print it")]
ModelName = Annotated[
    str,
    typer.Option("--model", help="model whose shapes are measured: folder, hub id or built-in name; no weights needed"),
]
ExecutorName = Annotated[
    str, typer.Option("--executor", help="executor whose exchange between ranks is measured: threads or processes")
]
Check = Annotated[
    str | None,
    typer.Option(
        "--check", help="model with weights for which predictions are compared with measurements; takes some minutes"
    ),
]
HardwareFile = Annotated[
    str | None, typer.Option("--hardware", help="check this YAML file instead of measuring constants; needs --check")
]


def calibrate(
    output: Output = None,
    model: ModelName = "smollm2-135m",
    executor: ExecutorName = "threads",
    check: Check = None,
    hardware: HardwareFile = None,
    as_json: Json = False,
) -> None:
    """Measure the constants of this machine for `plan`, `predict` and `simulate`."""
    require_choice("executor", executor, ("threads", "processes"))
    require(
        hardware is None or check is not None,
        "hardware",
        hardware,
        "replaces the measurement, so there is nothing to do",
        "add --check MODEL",
    )
    if output is not None:
        require(
            Path(output).suffix in (".yaml", ".yml"),
            "output",
            output,
            "is not the name of a YAML file",
            "use the suffix .yaml",
        )
        require(Path(output).parent.is_dir(), "output", output, "its folder does not exist", "create the folder first")
    from longspan.planner.hardware import hardware as machine_named

    console = Console(stderr=True)
    machine = _measure(console, model, executor) if hardware is None else machine_named(hardware)
    if hardware is None and (output is not None or check is None):
        _write(output, machine, as_json)
    if check is not None:
        _check(console, check, machine, executor, as_json)


def _measure(console: Console, model: str, executor: str) -> Hardware:
    from longspan.planner.calibrate import calibrate as measure

    with console.status("starting") as status:
        found = measure(model, executor, status.update)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    return found.machine


def _write(output: str | None, machine: Hardware, as_json: bool) -> None:
    from longspan.planner.hardware import hardware_to_yaml

    text = hardware_to_yaml(machine)
    if output is None:
        print(json.dumps(asdict(machine)) if as_json else text, end="")
        return
    try:
        Path(output).write_text(text)
    except OSError as error:
        raise ConfigError("output", output, f"cannot be written ({error.strerror})", "give another file") from error


def _check(console: Console, model: str, machine: Hardware, executor: str, as_json: bool) -> None:
    from longspan.planner.simulate.check import run_checks

    with console.status("starting") as status:
        checks = run_checks(model, machine, executor, status.update)
    _show(console, model, checks)
    if as_json:
        rows = [{**asdict(row), "error": row.error} for row in checks.rows]
        trace = {
            **asdict(checks.trace), "throughput_error": checks.trace.throughput_error,
            "ttft_error": checks.trace.ttft_error,
        }  # fmt: skip
        print(json.dumps({"model": model, "median_error": checks.median_error, "rows": rows, "trace": trace}))


def _show(console: Console, model: str, checks: Checks) -> None:
    columns = ("", "size", "ranks", "predicted", "measured", "second round", "error")
    caption = "* the two measurements differ by more than 10 %"
    table = new_table(f"{model}: predicted and measured, ms", columns, caption=caption)
    for row in checks.rows:
        times = (f"{seconds * 1e3:,.1f}" for seconds in (row.predicted_s, row.measured_s, row.again_s))
        mark = "" if row.agrees else " *"
        table.add_row(row.kind, f"{row.size:,}", str(row.ranks), *times, f"{row.error:+.1%}{mark}")
    console.print(table)
    worst = max(abs(row.error) for row in checks.rows)
    console.print(f"median error {checks.median_error:.1%}, worst {worst:.1%}", highlight=False)
    _show_trace(console, checks)


def _show_trace(console: Console, checks: Checks) -> None:
    found = checks.trace
    columns = ("", "output tokens/s", "median first token, ms", "median per output token, ms")
    table = new_table(f"The same {found.real.completed} requests in the simulation and in the engine", columns)
    for name, report in (("simulated", found.simulated), ("real", found.real)):
        spreads = (report.ttft_s, report.tpot_s)
        cells = (f"{spread.median * 1e3:,.1f}" if spread else "-" for spread in spreads)
        table.add_row(name, f"{report.output_tokens_per_s:,.2f}", *cells)
    table.add_row("error", f"{found.throughput_error:+.1%}", f"{found.ttft_error:+.1%}", "")
    console.print(table)
