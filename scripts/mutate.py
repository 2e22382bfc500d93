"""Do the tests notice faults? Applies each fault of `mutations.py` to a copy of the source and runs tests on it.

    python scripts/mutate.py [--list] [--only NAME]... [--jobs 2] [--without-quick]

A fault's own tests run first, up to the first failure; if they all pass, the quick tests do. A fault that no test
notices has survived: it is listed, and the exit code is 1. Without any fault the named tests must pass, which is
checked first; what cannot even be imported or collected is an error, not a fault that was noticed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from mutations import FAULTS, Fault
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
QUICK = ("tests/unit", "tests/ranks")
PASSED, FAILED = 0, 1  # pytest's exit codes; any other is neither
TEST_SECONDS = 60  # a test that takes longer hangs: the fault was noticed
RUN_SECONDS = 900


@dataclass(frozen=True)
class Verdict:
    """What came of one fault."""

    fault: Fault
    noticed: bool
    by: str  # the test that failed, or why there is no answer
    seconds: float
    broken: bool = False  # the tests could not be run

    @property
    def word(self) -> str:
        """In one word."""
        return "BROKEN" if self.broken else "noticed" if self.noticed else "SURVIVED"


def apply(fault: Fault, source: Path) -> None:
    """Put a fault into a copy of the source."""
    file = source / "longspan" / fault.file
    text = file.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: its text is {text.count(fault.old)} times in {fault.file}; correct the list")
    file.write_text(text.replace(fault.old, fault.new))


def run_tests(source: Path, tests: Sequence[str], scratch: Path) -> tuple[int, str]:
    """pytest's exit code on a source, and the test that failed or the end of what it said."""
    command = [
        sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0",
        f"--timeout={TEST_SECONDS}", "--timeout-method=thread", *tests,
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return FAILED, f"hangs for {RUN_SECONDS} s"
    failed = [line.split(" ", 1)[1].split(" - ")[0] for line in said.splitlines() if line.startswith("FAILED ")]
    if "Timeout" in said and not failed and process.returncode != PASSED:  # it ended all of pytest
        return FAILED, "hangs"
    return process.returncode, failed[0] if failed else said[-2000:].strip()


def judge(fault: Fault, quick: bool) -> Verdict:
    """Whether a test notices it."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="longspan-mutate-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        apply(fault, source)
        code, said = run_tests(source, fault.tests, Path(folder))
        if code == PASSED and quick:
            code, said = run_tests(source, QUICK, Path(folder))
    seconds = time.monotonic() - began
    return Verdict(fault, code == FAILED, said, seconds, broken=code not in (PASSED, FAILED))


def check_without_faults(faults: Sequence[Fault], jobs: int) -> str | None:
    """What fails of the faults' own tests as the source stands."""
    named = sorted({test for fault in faults for test in fault.tests})
    parts = [part for part in (named[number::jobs] for number in range(jobs)) if part]

    def said(part: Sequence[str]) -> str | None:
        with TemporaryDirectory(prefix="longspan-mutate-") as folder:
            code, said = run_tests(SOURCE, part, Path(folder))
        return None if code == PASSED else said

    with ThreadPoolExecutor(jobs) as pool:
        return next((problem for problem in pool.map(said, parts) if problem), None)


def chosen(only: Sequence[str]) -> list[Fault]:
    """The faults whose name has one of the texts in it."""
    found = [fault for fault in FAULTS if not only or any(text in fault.name for text in only)]
    if not found:
        raise typer.BadParameter(f"{', '.join(only)}: no fault is called so; see --list", param_hint="--only")
    return found


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Faults with this text in their name; may be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the faults and their tests, and run nothing.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Faults tried at once.")] = 2,
    quick: Annotated[
        bool, typer.Option("--with-quick/--without-quick", help="Run the quick tests where a fault's own all pass.")
    ] = True,
) -> None:
    """Apply small faults to a copy of the source, one at a time, and list those that no test notices."""
    console, faults = Console(width=160), chosen(only or ())
    say = partial(console.print, highlight=False, markup=False)
    if show:
        say(table(faults))
        return
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("without faults", total=len(faults))
        if problem := check_without_faults(faults, jobs):
            say("Without any fault this fails:", problem)
            raise typer.Exit(2)
        verdicts: list[Verdict] = []
        progress.update(task, description="faults")
        for verdict in pool.map(lambda fault: judge(fault, quick), faults):
            verdicts.append(verdict)
            say(f"{verdict.word} {verdict.fault.name} ({verdict.seconds:.0f} s)")
            if verdict.noticed or verdict.broken:
                say(f"        by {verdict.by}" if verdict.noticed else verdict.by)
            progress.advance(task)
    survivors = [verdict.fault.name for verdict in verdicts if not verdict.noticed]
    say(f"{len(verdicts) - len(survivors)} of {len(verdicts)} noticed in {time.monotonic() - began:.0f} s")
    for name in survivors:
        say(f"not noticed: {name}")
    raise typer.Exit(bool(survivors))


def table(faults: Sequence[Fault]) -> Table:
    """The faults for people."""
    found = Table("fault", "file", "tests")
    for fault in faults:
        found.add_row(fault.name, fault.file, Text("\n".join(fault.tests)))
    return found


if __name__ == "__main__":
    typer.run(main)
