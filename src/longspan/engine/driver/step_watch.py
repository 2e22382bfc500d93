"""A time limit for steps: how long one may take, and whether the current one has taken longer.

It owns the limit and the clock; it must not know what a step does, nor what the caller does about a timeout.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from longspan.config import LivenessConfig
from longspan.errors import StepTimeout

_WARM_UP_STEPS = 8  # the first steps compile kernels, record graphs and open connections
_STEPS_REMEMBERED = 64
_FACTOR = 20.0  # a step may take this many times the expected seconds: the time of a token depends on its context


@dataclass(frozen=True)
class _Running:
    """The step that the core schedules or waits for."""

    # when the core began to schedule it, on the watch's clock
    started: float
    # its number; None while it is being scheduled
    step: int | None = None
    # tokens that the steps in flight compute or load
    tokens: int = 0


class StepWatch:
    """Measures the calls of the core's `step`. Another thread may call `check`.

    The clock runs during a call, so that the time the caller spends between calls does not count. The expected time is
    the tokens in flight times the most seconds that a token took in recent steps, from submission to result. For
    prefill this is too long, because a decode token takes more time than a prefill token. It can be too short where
    contexts have grown, which `_FACTOR` allows for.
    """

    def __init__(self, liveness: LivenessConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._floor = liveness.step_timeout, liveness.step_floor
        self._clock = clock
        self._paces: deque[float] = deque(maxlen=_STEPS_REMEMBERED)  # seconds a token
        self._is_known = liveness.pace is not None
        if liveness.pace is not None:
            self._paces.append(liveness.pace)
        self._to_warm_up = _WARM_UP_STEPS
        self._running: _Running | None = None

    @property
    def pace(self) -> float | None:
        """The most seconds that a token took in recent steps; None during warm-up, unless the configuration has it."""
        return None if self._to_warm_up and not self._is_known else max(self._paces)

    def limit(self, tokens: int) -> float | None:
        """Seconds that steps of `tokens` tokens may take; None for no limit."""
        pace = self.pace
        if pace is None:
            return None
        if self._timeout is None:
            return max(self._floor, _FACTOR * pace * tokens)
        return max(self._floor, self._timeout) if self._to_warm_up else self._timeout

    def begin(self) -> None:
        """Start the clock: the core begins to schedule a step."""
        self._running = _Running(self._clock())

    def wait_for(self, step: int, tokens: int) -> None:
        """Note that the core now waits for the result of `step`, with `tokens` tokens in flight."""
        if self._running is not None:
            self._running = replace(self._running, step=step, tokens=tokens)

    def end(self) -> None:
        """Stop the clock."""
        self._running = None

    def measured(self, tokens: int, seconds: float) -> None:
        """Record that a step of `tokens` tokens took so many seconds."""
        if tokens:
            self._paces.append(seconds / tokens)
            self._to_warm_up = max(0, self._to_warm_up - 1)

    def check(self) -> None:
        """Raise `StepTimeout` if the current step has taken longer than its limit."""
        running = self._running
        limit = self.limit(running.tokens) if running else None
        if running is None or limit is None or (seconds := self._clock() - running.started) <= limit:
            return
        what = "scheduling a step" if running.step is None else f"step {running.step} ({running.tokens} tokens)"
        reason = (
            "step_timeout" if self._timeout is not None
            else f"the larger of {self._floor:.0f} s and {_FACTOR:.0f} times the time expected from recent steps"
        )  # fmt: skip
        raise StepTimeout(
            f"{what} has not ended after {seconds:.1f} s, and its limit is {limit:.1f} s ({reason}); "
            "a rank hangs: find out what it waits for, or raise --step-timeout if steps may take so long"
        )
