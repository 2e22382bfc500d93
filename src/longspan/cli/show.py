"""Tables and progress bars of the commands.

It owns their form; the commands give the content.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_REFRESHES = 4  # refreshes of a bar per second: drawing slows down what is measured


def new_table(
    title: str | None, columns: Sequence[str], left: Collection[str] = ("",), no_wrap: bool = False, **options: Any
) -> Table:
    """A table without rows. Columns in `left` are aligned to the left, all others, which hold numbers, to the right."""
    table = Table(title=title, **options)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=no_wrap)
    return table


@contextmanager
def step_bar(console: Console, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Shows progress while the block runs: a bar with the elapsed time on a terminal, elsewhere a line for each step.

    The block gets a function, which it calls with the name of each of its `total` steps when the step starts.
    """
    with _progress(console) as progress:
        task = progress.add_task("starting", total=total)
        started = 0

        def show(what: str) -> None:
            nonlocal started
            progress.update(task, description=what, completed=started)
            started += 1
            if not console.is_terminal:
                console.print(what, highlight=False, markup=False, soft_wrap=True)

        yield show


@contextmanager
def progress_bar(console: Console, what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows a bar while the block runs. The block gets a function, which it calls with (number done, total)."""
    with _progress(console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def _progress(console: Console) -> Progress:
    """A progress display of description, bar, counts and elapsed time, which disappears at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=_REFRESHES)
