"""Traces: when a rank computed and when it transferred, to show how far both overlap.

It owns the spans and their conversion to a Chrome trace; it must not know what is computed or sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, NamedTuple, TypeVar

COMPUTE, TRANSFER, STEP = "compute", "transfer", "step"
_LANES = (STEP, COMPUTE, TRANSFER)
T = TypeVar("T")


class TraceSpan(NamedTuple):
    """One activity of a rank. Times are in seconds of this machine's monotonic clock."""

    # label of the collective, or name of the activity
    name: str
    # `COMPUTE`, `TRANSFER` or `STEP`
    lane: str
    # when it began
    start: float
    # when it ended
    stop: float


@dataclass
class Trace:
    """The spans of one rank."""

    # whether spans are recorded
    on: bool = False
    # the spans so far, in the order in which they ended
    spans: list[TraceSpan] = field(default_factory=list)

    @contextmanager
    def span(self, name: str, lane: str) -> Iterator[None]:
        """Record the time that the block takes."""
        start = time.perf_counter()
        yield
        if self.on:
            self.spans.append(TraceSpan(name, lane, start, time.perf_counter()))

    def until_arrival(self, name: str, arrival: Callable[[], T]) -> Callable[[], T]:
        """Record a transfer from now to its arrival, not to the time when the caller asks for the tensor.

        If the trace is on, a thread waits for the arrival. Returns the function to call in place of `arrival`.
        """
        if not self.on:
            return arrival
        start, found = time.perf_counter(), []

        def wait() -> None:
            found.append(arrival())
            self.spans.append(TraceSpan(name, TRANSFER, start, time.perf_counter()))

        waiting = Thread(target=wait, daemon=True)
        waiting.start()

        def arrived() -> T:
            waiting.join()
            return found[0] if found else arrival()  # the thread's call raised: raise here too

        return arrived


def chrome_trace(spans_of_rank: Mapping[int, Sequence[TraceSpan]]) -> dict[str, Any]:
    """The spans as the JSON object that chrome://tracing and Perfetto read: ranks are processes, lanes threads."""
    events: list[dict[str, Any]] = []
    for rank, spans in spans_of_rank.items():
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for number, lane in enumerate(_LANES):
            events.append({"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": lane}})
        events += [
            {
                "ph": "X", "pid": rank, "tid": _LANES.index(span.lane), "name": span.name, "cat": span.lane,
                "ts": span.start * 1e6, "dur": (span.stop - span.start) * 1e6,
            }
            for span in spans
        ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def overlap(spans: Sequence[TraceSpan]) -> float:
    """Seconds in which a rank computed and transferred at the same time."""
    moving = sorted((s.start, s.stop) for s in spans if s.lane == TRANSFER)
    computing = sorted((s.start, s.stop) for s in spans if s.lane == COMPUTE)
    total, first = 0.0, 0
    for start, stop in computing:
        while first < len(moving) and moving[first][1] < start:
            first += 1
        total += sum(max(0.0, min(stop, b) - max(start, a)) for a, b in moving[first:] if a < stop)
    return total
