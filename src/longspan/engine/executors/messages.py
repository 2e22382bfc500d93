"""What a worker process tells its driver.

It owns the message types; it must not know how they travel.
"""

from __future__ import annotations

import msgspec

from longspan import errors
from longspan.attention.cost import CostConstants
from longspan.errors import EngineError, LongspanError, WorkerDied
from longspan.parallel.trace import TraceSpan
from longspan.request import SampledToken


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The rank has loaded its weights, and measured the cost model's constants if it was to."""

    rank: int
    constants: CostConstants | None


class Stepped(msgspec.Struct, tag=True, frozen=True):
    """A step is done."""

    rank: int
    tokens: list[SampledToken]


class TrafficReport(msgspec.Struct, tag=True, frozen=True):
    """What the rank has sent so far."""

    rank: int
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


FromWorker = Ready | Stepped | TrafficReport | TraceReport | Failed


def failure(rank: int, error: BaseException) -> Failed:
    """The message for an error."""
    return Failed(rank, type(error).__name__, str(error), isinstance(error, WorkerDied))


def report_error(message: Failed) -> LongspanError:
    """The error for a message: of the same class where it is one of ours with a plain message."""
    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, (errors.ModelError, EngineError)):
        return kind(message.message)
    return WorkerDied(f"rank {message.rank} failed: {message.kind}: {message.message}")
