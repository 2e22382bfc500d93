"""Where the KV of a prompt is, when another instance has computed it.

It owns what ranks of an instance say of what they store; pure data, it must not know how bytes travel.
"""

from __future__ import annotations

from dataclasses import dataclass

Extent = tuple[int, int]
"""[start, stop) of layers, heads or positions."""

FIRST_FOR_OTHERS = 1 << 62
"""From here on requests are numbered that are computed for other instances; below are a server's own."""


@dataclass(frozen=True)
class Part:
    """What one rank stores of every page of its shard."""

    rank: int
    shard: int
    layers: Extent
    heads: Extent


@dataclass(frozen=True)
class Source:
    """Where the KV of a prompt is to be had: ranks' `addresses` and `parts`, both in rank order.

    `request` is the prompt's number there, in that `life` of the instance.
    """

    life: str
    addresses: tuple[str, ...]
    parts: tuple[Part, ...]
    request: int = 0


def is_for_others(request_id: int) -> bool:
    """Whether a request is computed for another instance."""
    return request_id >= FIRST_FOR_OTHERS
