"""Where the KV of a prompt is when another instance has computed it.

It owns the records that describe what each rank of an instance stores; it must not know how bytes are transferred.
"""

from __future__ import annotations

from dataclasses import dataclass

Extent = tuple[int, int]
"""[start, stop) of layers, heads or positions."""


@dataclass(frozen=True)
class Part:
    """What one rank stores of every page of its shard."""

    # the rank, in its own instance
    rank: int
    # the shard whose pages it stores
    shard: int
    # layers of the model
    layers: Extent
    # KV heads of the model
    heads: Extent


@dataclass(frozen=True)
class Source:
    """The instance from which the KV of a prompt can be fetched."""

    # the epoch of its core, which changes with every restart
    life: str
    # addresses of its ranks, in rank order
    addresses: tuple[str, ...]
    # what each of these ranks stores, in rank order
    parts: tuple[Part, ...]
    # the request's id in that instance, valid in that epoch
    request: str = ""
