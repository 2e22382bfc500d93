"""Pairs instead of a full product: each value of every list is tried, and not each combination."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

First = TypeVar("First")
Second = TypeVar("Second")


def in_turn(firsts: Sequence[First], seconds: Iterable[Second], each: int = 1) -> list[tuple[First, Second]]:
    """Every one of `seconds` with `each` of `firsts`, which take turns."""
    return [
        (firsts[(number + step) % len(firsts)], second) for number, second in enumerate(seconds) for step in range(each)
    ]
