"""The interface of executors, which carry plans to the ranks: as threads, as processes, on Ray, or to none at all.

It owns the interface; an executor must not depend on what a plan contains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from longspan.config import CostConstants
from longspan.engine.setup import EngineSetup
from longspan.errors import WorkerDied
from longspan.parallel.collectives import Traffic
from longspan.parallel.trace import TraceSpan
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult


def require_open(closed: bool) -> None:
    """Raise `WorkerDied` if the ranks have been shut down."""
    if closed:
        raise WorkerDied("the ranks have been shut down; start the engine again")


class Executor(Protocol):
    """All ranks of an engine. They run steps in the order of `submit`, and `collect` returns results in that order."""

    # the setup it was made with, the host of every rank, and what ranks have measured of their memory
    setup: EngineSetup

    @property
    def constants(self) -> CostConstants | None:
        """The cost model's constants, if the ranks have measured them at their start; else None."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step on every rank, after those in flight. Raises `WorkerDied` if the ranks have ended."""

    def collect(self, while_waiting: Callable[[], None]) -> StepResult:
        """Wait for the oldest step in flight. Raises `EngineError` (often `WorkerDied`) if a rank cannot finish it.

        `while_waiting` is called several times a second. If it raises, the ranks are ended (threads that hang cannot
        be) and the exception is passed on.
        """

    def check(self) -> None:
        """Raise `WorkerDied` if a rank has ended. Call it while no step is in flight."""

    def late(self) -> str | None:
        """Which rank has not answered for some seconds, and for how long; None if all have. Any thread may call it."""

    def traffic(self) -> Traffic:
        """What all ranks have sent since they started."""

    def trace(self) -> dict[int, list[TraceSpan]]:
        """The recorded spans of every rank, by rank; empty unless the configuration turns tracing on."""

    def shutdown(self) -> None:
        """End every rank. May be called more than once."""
