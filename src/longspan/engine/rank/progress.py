"""A progress bar for the long parts of a start, on the standard error of the rank that shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


@contextmanager
def progress_bar(what: str, count: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar of `count` parts; calling what it gives adds one. It is drawn with `shown`, on a terminal."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not (shown and sys.stderr.isatty()))
    with bar:
        task = bar.add_task(what, total=count)
        yield lambda: bar.advance(task)


def with_progress(what: str, items: Iterable[T], count: int, shown: bool) -> Iterator[T]:
    """The `count` items in order, with a `progress_bar`."""
    with progress_bar(what, count, shown) as advance:
        for item in items:
            yield item
            advance()
