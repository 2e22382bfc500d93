"""Tables and progress bars of the commands, on stderr.

It owns how they look; what stands in them is the commands'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_REFRESHES = 4  # of a bar, a second: drawing takes the time of what is measured


def new_table(
    title: str | None, columns: Sequence[str], left: Collection[str] = ("",), no_wrap: bool = False, **options: Any
) -> Table:
    """A table without rows. Its columns are of numbers, and so to the right, but for those in `left`."""
    table = Table(title=title, **options)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=no_wrap)
    return table


@contextmanager
def step_bar(console: Console, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """What goes on while a block runs, which calls what it is given with each new step, of `total`, and the time since
    the start: a bar on a terminal, elsewhere a line a step."""
    with _progress(console) as progress:
        task = progress.add_task("starting", total=total)
        begun = 0

        def show(what: str) -> None:
            nonlocal begun
            progress.update(task, description=what, completed=begun)
            begun += 1
            if not console.is_terminal:
                console.print(what, highlight=False, markup=False, soft_wrap=True)

        yield show


@contextmanager
def progress_bar(console: Console, what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar that goes with the block, which calls what it is given with how many are done, and of how many."""
    with _progress(console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def _progress(console: Console) -> Progress:
    """What is done, a bar, how many of how many, and the time; it goes with its block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=_REFRESHES)
