"""No ranks: every step returns made-up tokens at once, so that only the time of engine and server remains.

It owns these tokens; it must not load weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from longspan.config import CostConstants
from longspan.engine.setup import EngineSetup
from longspan.parallel.collectives import Traffic
from longspan.parallel.trace import TraceSpan
from longspan.plan.plan import Segment, StepPlan
from longspan.plan.result import StepResult
from longspan.request import SampledToken, TokenLogprobs

_STRIDE = 7919  # a prime, so that neighbouring tokens differ
_CERTAIN = TokenLogprobs(0.0, (), ())


class DryExecutor:
    """See `Executor`. The token at a position is always the same."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup
        self.constants: CostConstants | None = None
        self._vocabulary = setup.model.vocab_size
        self._done: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        """See `Executor.submit`."""
        self._done.append(StepResult(tuple(t for segment in plan.segments for t in self._sampled(segment))))

    def collect(self, while_waiting: Callable[[], None]) -> StepResult:
        """See `Executor.collect`."""
        return self._done.popleft()

    def check(self) -> None:
        """See `Executor.check`."""

    def late(self) -> str | None:
        """See `Executor.late`."""
        return None

    def traffic(self) -> Traffic:
        """See `Executor.traffic`."""
        return Traffic()

    def trace(self) -> dict[int, list[TraceSpan]]:
        """See `Executor.trace`."""
        return {}

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""

    def _sampled(self, segment: Segment) -> list[SampledToken]:
        """The tokens of the last `segment.sample` positions."""
        positions = range(segment.stop - segment.sample, segment.stop)
        return [SampledToken(segment.request_id, p * _STRIDE % self._vocabulary, _CERTAIN, p) for p in positions]
