"""Messages between a driver and its ranks, except plans.

It owns the message types; it must not know how they are sent.
"""

from __future__ import annotations

import msgspec

from longspan.config import CostConstants, EngineConfig
from longspan.engine.memory_use import MemoryUse
from longspan.errors import LongspanError, WorkerDied, error_named
from longspan.parallel.trace import TraceSpan
from longspan.plan.result import StepResult

PROBE = b""
"""Has no reply: its sending fails if the rank has disconnected."""

HEARTBEAT = b"alive?"
"""Sent to a rank's heartbeat connection. The reply is `RankAlive`."""

STOP, TRAFFIC, TRACE = b"stop", b"traffic", b"trace"
"""The other messages to a rank that is ready, except plans: `TrafficReport` and `TraceReport` are the replies."""


class RankHello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a rank."""

    # the sender
    rank: int
    # number of ranks that its launcher started
    world_size: int
    # Longspan's version on its host
    version: str
    # address of its host; empty on the driver's host
    host: str
    # port of the TCPStore that rank 0 opens if ranks are on several hosts; else 0
    store_port: int


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The driver's reply to every rank, once all of them have sent `RankHello`."""

    # the driver's configuration, from which the rank makes its setup
    config: EngineConfig
    # for the rendezvous of the ranks: `tcp://host:port` of the TCPStore of rank 0, or a file if all are on one host
    rendezvous: str
    # number of ranks on this rank's host
    ranks_on_host: int


class RankRefused(msgspec.Struct, tag=True, frozen=True):
    """The driver's reply to a rank of another layout or version."""

    # why the rank is refused, for its error message
    reason: str


class RankReady(msgspec.Struct, tag=True, frozen=True):
    """The rank has loaded its weights and is ready for plans."""

    # the sender
    rank: int
    # the cost model's constants; None if the rank has not measured them
    constants: CostConstants | None
    # what the rank has measured of its GPU's memory; None if it has not
    memory: MemoryUse | None = None


class RankAlive(msgspec.Struct, tag=True, frozen=True):
    """The reply to `HEARTBEAT`, on the heartbeat's own connection."""

    # the sender
    rank: int


class StepDone(msgspec.Struct, tag=True, frozen=True):
    """The rank has finished a step."""

    # the rank's part of the step's result
    result: StepResult


class TrafficReport(msgspec.Struct, tag=True, frozen=True):
    """The reply to `TRAFFIC`: what the rank has sent to other ranks since it started."""

    # bytes, by the label of the collective
    bytes_by_label: dict[str, int]
    # number of calls, by the label of the collective
    calls_by_label: dict[str, int]


class TraceReport(msgspec.Struct, tag=True, frozen=True):
    """The reply to `TRACE`."""

    # the sender
    rank: int
    # what the rank computed and sent, with start and end
    spans: list[TraceSpan]


class RankFailed(msgspec.Struct, tag=True, frozen=True):
    """The rank has failed, and its process ends."""

    # the sender
    rank: int
    # name of the exception's class
    kind: str
    # the exception's message
    message: str
    # whether it failed because a collective lost another rank, so that rank's failure is the cause
    lost_peer: bool


ToWorker = Begin | RankRefused
FromWorker = RankHello | RankReady | RankAlive | StepDone | TrafficReport | TraceReport | RankFailed


def failure(rank: int, error: BaseException) -> RankFailed:
    """The message that reports an exception to the driver."""
    return RankFailed(rank, type(error).__name__, str(error), isinstance(error, WorkerDied))


def report_error(message: RankFailed) -> LongspanError:
    """The exception that the driver raises for a rank's failure.

    It has the class of the rank's exception if that is a `ModelError` or an `EngineError`, else it is a `WorkerDied`.
    """
    text = f"rank {message.rank} failed: {message.kind}: {message.message}"
    return error_named(message.kind, message.message) or WorkerDied(text)
