"""Messages between a prefill and a decode instance, between their ranks, and from ranks to their own driver.

It owns the message types and their encoding; it must not know who sends them when.
"""

from __future__ import annotations

import msgspec

from longspan.plan.source import Extent, Source


class Format(msgspec.Struct, frozen=True):
    """What must be equal on both sides so that pages of one can be stored by the other."""

    # version of these messages
    protocol: int
    # fingerprint of the model's configuration
    model: str
    # fingerprint of the weights
    weights: str
    # dtype of weights and activations
    dtype: str
    # dtype of the KV cache, as configured
    kv_cache_dtype: str
    # cache rows of a token in each layer and KV head: 2 for keys and values, 1 for latents
    kv_factor: int
    # bytes of a cache row, with its scales
    row_bytes: int


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a decode instance on a connection."""

    # of the sender
    format: Format


class Prefill(msgspec.Struct, tag=True, frozen=True):
    """Asks a prefill instance to compute a prompt and to hold its pages until `Release`."""

    # the decode instance's number for it; a retry has a new one
    number: int
    # the prompt
    token_ids: list[int]


class Release(msgspec.Struct, tag=True, frozen=True):
    """The prefill instance may free a prompt's pages: they have been fetched, or are no longer needed."""

    # as in `Prefill`
    number: int


ToPrefill = Hello | Prefill | Release


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The reply to a `Hello` whose format is equal."""

    # the prefill instance's ranks; without a request
    source: Source


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The reply to a `Hello` whose format differs."""

    # the difference and a remedy
    reason: str


class Accepted(msgspec.Struct, tag=True, frozen=True):
    """The prefill instance has queued a prompt."""

    # as in `Prefill`
    number: int
    # the request's id in the prefill instance. Ranks send its pages to any peer that names it
    request: str


class Computed(msgspec.Struct, tag=True, frozen=True):
    """All pages of a prompt are computed and can be fetched."""

    # as in `Prefill`
    number: int


class PrefillFailed(msgspec.Struct, tag=True, frozen=True):
    """A prompt will not be computed, or its pages have been freed."""

    # as in `Prefill`
    number: int
    # for the decode instance's log
    reason: str


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Has no reply: its sending fails if the decode instance has disconnected."""


ToDecode = Welcome | Refused | Accepted | Computed | PrefillFailed | Ping


class SenderReady(msgspec.Struct, tag=True, frozen=True):
    """A rank's `PageSender` listens."""

    # the sender of this message
    rank: int
    # where decode ranks connect to
    address: str


class FetchProgress(msgspec.Struct, tag=True, frozen=True):
    """Pages of a fetch have arrived at a rank since its last message."""

    # the fetch's number
    fetch: int


class FetchDone(msgspec.Struct, tag=True, frozen=True):
    """A rank has received its part of a fetch."""

    # the sender of this message
    rank: int
    # the fetch's number
    fetch: int
    # bytes of KV that this rank received for it
    received: int


class FetchFailed(msgspec.Struct, tag=True, frozen=True):
    """A rank cannot receive its part of a fetch. Other fetches go on."""

    # the sender of this message
    rank: int
    # the fetch's number
    fetch: int
    # for the log
    reason: str


class TransferFailed(msgspec.Struct, tag=True, frozen=True):
    """A rank's transfer thread has ended with an exception, so the rank can transfer no more pages."""

    # the sender of this message
    rank: int
    # the exception
    reason: str


FromRank = SenderReady | FetchProgress | FetchDone | FetchFailed | TransferFailed


class Subscribe(msgspec.Struct, tag=True, frozen=True):
    """Asks a prefill rank to report tokens of a request as they are computed, in `Available` messages."""

    # epoch of the prefill instance
    epoch: str
    # the request's id there
    request: str


class Unsubscribe(msgspec.Struct, tag=True, frozen=True):
    """Ends a `Subscribe`."""

    # as in `Subscribe`
    epoch: str
    request: str


class PageRequest(msgspec.Struct, tag=True, frozen=True):
    """Asks a prefill rank for one block of KV: layers × KV heads × positions. The reply has the same `block`."""

    # epoch of the prefill instance
    epoch: str
    # the receiver's number for the block
    block: int
    # the request's id in the prefill instance
    request: str
    # layers of the model
    layers: Extent
    # KV heads of the model
    heads: Extent
    # positions of the request, in order
    runs: tuple[Extent, ...]


ToSender = Subscribe | Unsubscribe | PageRequest


class Available(msgspec.Struct, tag=True, frozen=True):
    """Tokens of a subscribed request have been computed, and this rank can send their KV."""

    # epoch of the prefill instance
    epoch: str
    # the request's id there
    request: str
    # positions that were not reported before, in order; all of them again after the request was preempted
    runs: list[Extent]


class PageBlock(msgspec.Struct, tag=True, frozen=True):
    """The reply to a `PageRequest`. A second frame has the block's bytes, see `PoolAccess`."""

    # as in `PageRequest`
    block: int


class Missing(msgspec.Struct, tag=True, frozen=True):
    """The reply to a `PageRequest` for tokens that this rank does not have."""

    # as in `PageRequest`
    block: int


ToReceiver = Available | PageBlock | Missing


def encode(message: msgspec.Struct) -> bytes:
    """A message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: object) -> msgspec.Struct | None:
    """A message of a type or union `kind`; None for bytes that are no such message, which any peer may send."""
    try:
        message: msgspec.Struct = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return message
