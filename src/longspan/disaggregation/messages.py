"""What the two sides of a pair, and the ranks of each with their driver, tell each other.

It owns the message types and their encoding; it must not know who sends them when.
"""

from __future__ import annotations

import msgspec

from longspan.plan.source import Extent, Source


class Format(msgspec.Struct, frozen=True):
    """What must be equal on both sides for a page to mean the same: fingerprints, names and sizes of a cache row."""

    protocol: int
    model: str
    weights: str
    dtype: str
    kv_cache_dtype: str
    kv_factor: int
    row_bytes: int


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A decode instance introduces itself."""

    format: Format


class Prefill(msgspec.Struct, tag=True, frozen=True):
    """Wanted: the KV of these tokens. `number` is the decode instance's own: another one each time it asks."""

    number: int
    token_ids: list[int]


class Release(msgspec.Struct, tag=True, frozen=True):
    """The KV of `number` has arrived, or is no longer wanted."""

    number: int


ToPrefill = Hello | Prefill | Release


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The answer to `Hello`: where pages will be."""

    source: Source


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The answer to a `Hello` that does not fit."""

    reason: str


class Accepted(msgspec.Struct, tag=True, frozen=True):
    """A prompt will be computed; `request` is what it is called on the prefill side."""

    number: int
    request: str


class Computed(msgspec.Struct, tag=True, frozen=True):
    """All of a prompt's pages can be fetched."""

    number: int


class Ended(msgspec.Struct, tag=True, frozen=True):
    """A prompt will not be computed, or its pages are gone."""

    number: int
    reason: str


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """Nothing new; the sender learns whether the other side is still there."""


ToDecode = Welcome | Refused | Accepted | Computed | Ended | Pulse


class Serving(msgspec.Struct, tag=True, frozen=True):
    """A rank answers questions for pages at this address."""

    rank: int
    address: str


class Moving(msgspec.Struct, tag=True, frozen=True):
    """A fetch goes on."""

    fetch: int


class Arrived(msgspec.Struct, tag=True, frozen=True):
    """A rank has all of a fetch that it was to store; `received` bytes of KV."""

    rank: int
    fetch: int
    received: int


class FetchFailed(msgspec.Struct, tag=True, frozen=True):
    """A rank cannot have its part of one fetch; others go on."""

    rank: int
    fetch: int
    reason: str


class Broken(msgspec.Struct, tag=True, frozen=True):
    """A rank can move no more pages."""

    rank: int
    reason: str


FromRank = Serving | Moving | Arrived | FetchFailed | Broken


class Watch(msgspec.Struct, tag=True, frozen=True):
    """Wanted: word of every token of a request that this rank has."""

    life: str
    request: str


class Unwatch(msgspec.Struct, tag=True, frozen=True):
    """No longer wanted."""

    life: str
    request: str


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Wanted: one block."""

    life: str
    block: int
    request: str
    layers: Extent
    heads: Extent
    runs: tuple[Extent, ...]


ToSender = Watch | Unwatch | Ask


class Have(msgspec.Struct, tag=True, frozen=True):
    """These tokens can be asked for."""

    life: str
    request: str
    runs: list[Extent]


class Block(msgspec.Struct, tag=True, frozen=True):
    """The answer to an `Ask`; its bytes follow."""

    block: int


class Missing(msgspec.Struct, tag=True, frozen=True):
    """The answer where the tokens are no longer there."""

    block: int


ToReceiver = Have | Block | Missing


def encode(message: msgspec.Struct) -> bytes:
    """As msgpack bytes."""
    return msgspec.msgpack.encode(message)
