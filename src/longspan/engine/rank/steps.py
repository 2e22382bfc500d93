"""Steps on one rank: where the device works on its own, the next is started before the last one's tokens are read.

It owns this order; it must not know how plans and tokens travel.
"""

from __future__ import annotations

from collections.abc import Callable

from longspan.engine.rank.runner import Finish, Runner
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult


class StepLoop:
    """`answer` gets every step's result, in order; `more` tells whether another plan is waiting."""

    def __init__(self, runner: Runner, answer: Callable[[StepResult], None], more: Callable[[], bool]) -> None:
        self._runner = runner
        self._answer = answer
        self._more = more
        self._under_way: Finish | None = None

    def take(self, plan: StepPlan) -> None:
        """Carry out a plan, and answer the one before if that is still open."""
        started = self._runner.start(plan)
        self.flush()
        self._under_way = started
        if not (self._runner.is_asynchronous and self._more()):
            self.flush()

    def flush(self) -> None:
        """Wait for the step in flight and answer it."""
        finish, self._under_way = self._under_way, None
        if finish is not None:
            self._answer(finish())
