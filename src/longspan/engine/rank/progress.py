"""A progress bar for the long parts of a start, on the standard error of the rank that shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def with_progress(what: str, items: Sequence[T], shown: bool) -> Iterator[T]:
    """The items in order. With `shown` a bar says how many are done, if standard error is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield from items
        return
    yield from track(items, what, console=Console(stderr=True), transient=True)
