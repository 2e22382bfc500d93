"""What the live page shows of the past: two minutes of rates and latencies, requests that ended, errors.

It owns how much is remembered; counters for Prometheus are the metrics'.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from longspan.scheduler.counters import SchedulerCounters

_SECONDS = 120  # that the page shows
_LATENCIES = 4096  # of each kind that are remembered within them
_ENDED_SECONDS = 30.0  # that a request stays on the page after its end
_ENDED, _ERRORS = 32, 20  # requests and errors that are remembered
Quantiles = tuple[float | None, float | None]
"""Median and 95th percentile, by nearest rank; None without any."""


@dataclass(frozen=True)
class EndedRequest:
    """One completion that has ended."""

    # its id in the core
    id: str
    # one of `FinishReason`
    reason: str
    # tokens of the prompt
    prompt_tokens: int
    # tokens of the prompt found in the prefix cache
    cached_tokens: int
    # tokens generated
    output_tokens: int
    # from arrival to first token; None without one
    ttft_s: float | None
    # from arrival to end
    e2e_s: float


@dataclass(frozen=True)
class FailedRequest:
    """One answer with an error. It tells nothing that a client has sent but method and path."""

    # HTTP status
    status: int
    # HTTP method
    method: str
    # path, escaped
    path: str
    # what was wrong
    reason: str


class History:
    """The recent past of one server. `tick` must be called once a second."""

    def __init__(self) -> None:
        self.points: deque[dict[str, Any]] = deque(maxlen=_SECONDS)
        self._ttft, self._itl = _Latencies(), _Latencies()
        # each with the time of its end, in `time.monotonic()`
        self._ended: deque[tuple[float, EndedRequest]] = deque(maxlen=_ENDED)
        self._errors: deque[tuple[float, FailedRequest]] = deque(maxlen=_ERRORS)
        self._started = time.monotonic()
        self._last = (self._started, 0, 0)

    def first_token(self, seconds: float) -> None:
        """Remember the time to a first token."""
        self._ttft.add(time.monotonic(), seconds)

    def next_token(self, seconds: float) -> None:
        """Remember the time between two tokens."""
        self._itl.add(time.monotonic(), seconds)

    def ended(self, request: EndedRequest) -> None:
        """Remember a completion that has ended."""
        self._ended.append((time.monotonic(), request))

    def failed(self, request: FailedRequest) -> None:
        """Remember an error."""
        self._errors.append((time.monotonic(), request))

    def tick(self, output_tokens: int, prompt_tokens: int, load: SchedulerCounters) -> None:
        """Add the time since the last call; tokens are counted since the start."""
        now, (before, outputs, prompts) = time.monotonic(), self._last
        seconds = max(now - before, 1e-9)
        ttft, itl = self.quantiles(now)
        self.points.append(
            {
                "t": round(now - self._started, 1),
                "output_tokens_per_s": round((output_tokens - outputs) / seconds, 2),
                "prompt_tokens_per_s": round((prompt_tokens - prompts) / seconds, 2),
                "running": load.running,
                "waiting": load.waiting,
                "ttft_median_s": ttft[0],
                "ttft_p95_s": ttft[1],
                "itl_median_s": itl[0],
                "itl_p95_s": itl[1],
            }
        )
        self._last = (now, output_tokens, prompt_tokens)

    def quantiles(self, now: float | None = None) -> tuple[Quantiles, Quantiles]:
        """Of the times to a first token, and of those between tokens."""
        now = time.monotonic() if now is None else now
        return self._ttft.quantiles(now), self._itl.quantiles(now)

    def recently_ended(self) -> list[dict[str, Any]]:
        """Completions that ended some seconds ago, newest first; `ago_s` is added."""
        return [found for found in _with_age(self._ended) if found["ago_s"] <= _ENDED_SECONDS]

    def errors(self) -> list[dict[str, Any]]:
        """The last errors, newest first; `ago_s` is added."""
        return _with_age(self._errors)


class _Latencies:
    """Latencies of the time that the page shows."""

    def __init__(self) -> None:
        self._found: deque[tuple[float, float]] = deque(maxlen=_LATENCIES)

    def add(self, now: float, seconds: float) -> None:
        self._found.append((now, seconds))

    def quantiles(self, now: float) -> Quantiles:
        while self._found and self._found[0][0] < now - _SECONDS:
            self._found.popleft()
        ordered = sorted(seconds for _, seconds in self._found)
        if not ordered:
            return None, None
        at = [ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95)]
        return round(at[0], 4), round(at[1], 4)


def _with_age(found: deque[tuple[float, Any]]) -> list[dict[str, Any]]:
    now = time.monotonic()
    return [{**asdict(one), "ago_s": round(now - at, 1)} for at, one in reversed(found)]
