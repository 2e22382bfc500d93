"""Samples of a full product, in which each value of every list occurs, or each two values together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any, TypeVar

First = TypeVar("First")
Second = TypeVar("Second")


def in_turn(firsts: Sequence[First], seconds: Iterable[Second], each: int = 1) -> list[tuple[First, Second]]:
    """Every one of `seconds` with `each` of `firsts`, which take turns."""
    return [
        (firsts[(number + step) % len(firsts)], second) for number, second in enumerate(seconds) for step in range(each)
    ]


def each_value(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which every value of every list occurs, in as many as the longest list has values.

    The lists are gone through at different speeds, so that short ones do not go in step.
    """
    count = max(map(len, axes.values()))
    return [
        {
            name: values[(case + case // len(values) * speed) % len(values)]
            for speed, (name, values) in enumerate(axes.items())
        }
        for case in range(count)
    ]


def every_pair(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which every two values of two lists occur together, each chosen to have most of those still missing."""
    sizes = {name: range(len(values)) for name, values in axes.items()}
    missing = {
        ((one, i), (other, j)) for one, other in combinations(sizes, 2) for i, j in product(sizes[one], sizes[other])
    }
    cases: list[dict[str, int]] = []
    while missing:
        (one, i), (other, j) = min(missing)
        case = {one: i, other: j}
        for name in (name for name in sizes if name not in case):
            case[name] = max(
                sizes[name], key=lambda value: sum(pair in missing for pair in _pairs({**case, name: value}))
            )
        case = {name: case[name] for name in sizes}
        missing -= set(_pairs(case))
        cases.append(case)
    return [{name: axes[name][index] for name, index in case.items()} for case in cases]


def _pairs(case: Mapping[str, int]) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    return list(combinations(case.items(), 2))
