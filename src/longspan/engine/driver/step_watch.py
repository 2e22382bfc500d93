"""How long a step may take, and whether the one that runs has taken longer.

It owns the limit and the clock; it must not know what a step does, nor what follows from its verdict.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from longspan.config import LivenessConfig
from longspan.errors import StepTimeout

_WARM_UP_STEPS = 8  # after a start steps compile kernels, record graphs and open connections
_STEPS_REMEMBERED = 64
_FACTOR = 20.0  # by which the expectation may be wrong: tokens differ in context, and so in time


@dataclass(frozen=True)
class _Running:
    """What the core waits for."""

    started: float
    step: int | None = None  # None while it is scheduled
    tokens: int = 0


class StepWatch:
    """Watches the calls of the core's `step`; `check` may be called by another thread.

    The clock runs while the core works on or waits for the next result: from the call's begin, so from the last
    result if steps are in flight, but not while the caller does something else. The expectation is the slowest
    seconds a token of recent steps, each from its submission to its result, times the tokens in flight. It is too
    long for prefill, whose tokens cost less than decode's, and never too short by more than contexts grow.
    """

    def __init__(self, liveness: LivenessConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._floor = liveness.step_timeout, liveness.step_floor
        self._clock = clock
        self._paces: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._is_known = liveness.pace is not None
        if liveness.pace is not None:
            self._paces.append(liveness.pace)
        self._to_warm_up = _WARM_UP_STEPS
        self._running: _Running | None = None

    @property
    def pace(self) -> float | None:
        """The slowest seconds a token of recent steps; None during warm-up, unless it was known before."""
        return None if self._to_warm_up and not self._is_known else max(self._paces)

    def limit(self, tokens: int) -> float | None:
        """Seconds that steps of so many tokens may take; None for any."""
        pace = self.pace
        if pace is None:
            return None
        if self._timeout is None:
            return max(self._floor, _FACTOR * pace * tokens)
        return max(self._floor, self._timeout) if self._to_warm_up else self._timeout

    def begin(self) -> None:
        """The core begins with a step."""
        self._running = _Running(self._clock())

    def wait_for(self, step: int, tokens: int) -> None:
        """The core waits for a step's result; so many tokens are in flight."""
        if self._running is not None:
            self._running = replace(self._running, step=step, tokens=tokens)

    def end(self) -> None:
        """The core has the result."""
        self._running = None

    def measured(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long."""
        if tokens:
            self._paces.append(seconds / tokens)
            self._to_warm_up = max(0, self._to_warm_up - 1)

    def check(self) -> None:
        """Raise `StepTimeout` if the step that runs has taken too long."""
        running = self._running
        limit = self.limit(running.tokens) if running else None
        if running is None or limit is None or (seconds := self._clock() - running.started) <= limit:
            return
        what = "scheduling a step" if running.step is None else f"step {running.step} ({running.tokens} tokens)"
        reason = (
            "step_timeout" if self._timeout is not None
            else f"the larger of {self._floor:.0f} s and {_FACTOR:.0f} times what recent steps let expect"
        )  # fmt: skip
        raise StepTimeout(
            f"{what} has not ended after {seconds:.1f} s, and its limit is {limit:.1f} s ({reason}); "
            "a rank hangs: see what it waits for, or raise --step-timeout if steps may take so long"
        )
