"""Where the KV of a prompt is, when another instance has computed it.

It owns what ranks of an instance say of what they store; pure data, it must not know how bytes travel.
"""

from __future__ import annotations

from dataclasses import dataclass

Extent = tuple[int, int]
"""[start, stop) of layers, heads or positions."""


@dataclass(frozen=True)
class Part:
    """What one rank stores of every page of its shard."""

    rank: int
    shard: int
    layers: Extent
    heads: Extent


@dataclass(frozen=True)
class Source:
    """Where the KV of a prompt is to be had."""

    # of the instance: another one after a restart
    life: str
    # of its ranks, and what they store, both in rank order
    addresses: tuple[str, ...]
    parts: tuple[Part, ...]
    # what the prompt is called there, in that life
    request: str = ""
