"""What a driver and its ranks tell each other, but for plans.

It owns the message types; it must not know how they travel.
"""

from __future__ import annotations

import msgspec

from longspan.config import CostConstants, EngineConfig
from longspan.errors import LongspanError, WorkerDied, error_named
from longspan.parallel.trace import TraceSpan
from longspan.plan.result import StepResult

THERE = b""  # the driver looks whether a rank is still there: no answer is wanted
ASK = b"alive?"  # of a rank's heartbeat, which answers with `Alive`
STOP, TRAFFIC, TRACE = b"stop", b"traffic", b"trace"  # whatever else comes once a rank is ready is a plan


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A rank's first word. Rank 0 keeps the store where ranks of several machines meet at `store_port` of its host."""

    rank: int
    world_size: int
    version: str
    host: str
    store_port: int


class Begin(msgspec.Struct, tag=True, frozen=True):
    """All ranks are there: what to run, the file or the `tcp://host:port` where they meet, and how many share
    this one's host."""

    config: EngineConfig
    meet_at: str
    ranks_here: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The driver has no place for the rank."""

    reason: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The rank has loaded its weights, and measured the cost model's constants if it was to."""

    rank: int
    constants: CostConstants | None


class Alive(msgspec.Struct, tag=True, frozen=True):
    """The rank's process runs; from a connection of its heartbeat's own."""

    rank: int


class Stepped(msgspec.Struct, tag=True, frozen=True):
    """A step is done."""

    result: StepResult


class TrafficReport(msgspec.Struct, tag=True, frozen=True):
    """What the rank has sent so far."""

    bytes_by_label: dict[str, int]
    calls_by_label: dict[str, int]


class TraceReport(msgspec.Struct, tag=True, frozen=True):
    """What the rank did when."""

    rank: int
    spans: list[TraceSpan]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The rank cannot go on. `lost_peer`: only because another one ended."""

    rank: int
    kind: str
    message: str
    lost_peer: bool


ToWorker = Begin | Refused
FromWorker = Hello | Ready | Alive | Stepped | TrafficReport | TraceReport | Failed


def failure(rank: int, error: BaseException) -> Failed:
    """The message for an error."""
    return Failed(rank, type(error).__name__, str(error), isinstance(error, WorkerDied))


def report_error(message: Failed) -> LongspanError:
    """The error for a message: of the same class where it is one of ours with a plain message."""
    told = f"rank {message.rank} failed: {message.kind}: {message.message}"
    return error_named(message.kind, message.message) or WorkerDied(told)
