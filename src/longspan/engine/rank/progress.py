"""A progress bar for the long parts of a start, on the standard error of the rank that shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def with_progress(what: str, items: Iterable[T], count: int, shown: bool) -> Iterator[T]:
    """The `count` items in order. With `shown` a bar says how many are done, if standard error is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield from items
        return
    yield from track(items, what, total=count, console=Console(stderr=True), transient=True)
