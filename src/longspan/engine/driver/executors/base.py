"""What carries plans to ranks: one interface for threads, processes and what comes later.

It owns the interface; an executor must not look into a plan.
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
    """Raise `WorkerDied` if the ranks have ended: a plan would never be answered."""
    if closed:
        raise WorkerDied("the ranks have been shut down; start the engine again")


class Executor(Protocol):
    """All ranks of an engine. Steps run in the order they were submitted, and are collected in it.

    `setup` is the one it was made with, and knows on which machine every rank is.
    """

    setup: EngineSetup

    @property
    def constants(self) -> CostConstants | None:
        """Of the cost model, as the ranks measured them when they started; None if they were not to."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step on every rank, behind those in flight; raises `WorkerDied` if the ranks are gone."""

    def collect(self, look: Callable[[], None]) -> StepResult:
        """Wait for the oldest step in flight; raises `EngineError` (`WorkerDied`) if a rank cannot finish it.

        `look` is called several times a second meanwhile; what it raises ends the ranks, as far as that is possible.
        """

    def check(self) -> None:
        """Raise `WorkerDied` if a rank has ended: for times when nothing is in flight."""

    def late(self) -> str | None:
        """Which rank has not answered for some seconds, and how long; None if all have. Any thread may ask."""

    def traffic(self) -> Traffic:
        """What all ranks have sent since they started."""

    def trace(self) -> dict[int, list[TraceSpan]]:
        """What every rank did when, if the configuration asks for it."""

    def shutdown(self) -> None:
        """End every rank; safe to call again."""
