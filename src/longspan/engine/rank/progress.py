"""A progress bar for the long parts of a start, on the standard error of the rank that shows it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
_LOG = logging.getLogger("longspan.engine")


@contextmanager
def progress_bar(what: str, count: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar of `count` parts; calling what it gives adds one. It is drawn with `shown`, on a terminal.

    With `shown` the log says how long they took, if they end.
    """
    begin = perf_counter()
    bar = Progress(console=Console(stderr=True), transient=True, disable=not (shown and sys.stderr.isatty()))
    with bar:
        task = bar.add_task(what, total=count)
        yield lambda: bar.advance(task)
    if shown:
        _LOG.info("%s took %.1f s", what, perf_counter() - begin)


def with_progress(what: str, items: Iterable[T], count: int, shown: bool) -> Iterator[T]:
    """The `count` items in order, with a `progress_bar`."""
    with progress_bar(what, count, shown) as advance:
        for item in items:
            yield item
            advance()
