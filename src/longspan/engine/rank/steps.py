"""The loop over steps on one rank. On a GPU a step is started before the tokens of the previous one are read.

It owns this order; it must not know how plans and results are sent.
"""

from __future__ import annotations

from collections.abc import Callable

from longspan.engine.rank.runner import Finish, Runner
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult


class StepLoop:
    """Runs plans in order. `answer` is called with each step's result; `more` returns whether another plan waits."""

    def __init__(self, runner: Runner, answer: Callable[[StepResult], None], more: Callable[[], bool]) -> None:
        self._runner = runner
        self._answer = answer
        self._more = more
        self._in_flight: Finish | None = None

    def take(self, plan: StepPlan) -> None:
        """Start a plan, and answer the previous step if it is still in flight."""
        started = self._runner.start(plan)
        self.flush()
        self._in_flight = started
        if not (self._runner.is_asynchronous and self._more()):
            self.flush()

    def flush(self) -> None:
        """Wait for the step in flight and answer it."""
        finish, self._in_flight = self._in_flight, None
        if finish is not None:
            self._answer(finish())
