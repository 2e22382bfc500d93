"""Traces: when a rank or its GPU computed and when it transferred, to show how far both overlap.

It owns the spans and their conversion to a Chrome trace; it must not know what is computed or sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch

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


Moment = Callable[[], float]
"""A moment that may lie ahead on a device: the call waits for it, and returns its time as in `TraceSpan`."""


class HostTimer:
    """Moments at which the calling thread asks."""

    # whether `mark` may be called now
    ready = True

    def mark(self) -> Moment:
        """This moment."""
        at = time.perf_counter()
        return lambda: at


class DeviceTimer:
    """Moments at which a GPU has done what was launched before, by events on the current stream.

    There are none while a CUDA graph is captured: a replay does not record them again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._first, self._first_at = self._event(), time.perf_counter()

    @property
    def ready(self) -> bool:
        """See `HostTimer.ready`."""
        return not torch.cuda.is_current_stream_capturing()

    def mark(self) -> Moment:
        """See `HostTimer.mark`."""
        event = self._event()

        def seconds() -> float:
            event.synchronize()
            return self._first_at + float(self._first.elapsed_time(event)) / 1e3

        return seconds

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Trace:
    """The spans of one rank: of the device's work if it has a GPU, else of its thread."""

    def __init__(self, on: bool = False, device: torch.device | None = None) -> None:
        # whether spans are recorded
        self.on = on
        self._on_device = device is not None and device.type == "cuda"
        self._timer = DeviceTimer(device) if on and device is not None and self._on_device else HostTimer()
        self._found: list[tuple[str, str, Moment, Moment]] = []

    @property
    def spans(self) -> list[TraceSpan]:
        """The spans so far, in the order in which they ended. Waits for the device."""
        return [TraceSpan(name, lane, start(), stop()) for name, lane, start, stop in self._found]

    def clear(self) -> None:
        """Forget all spans."""
        self._found.clear()

    @contextmanager
    def span(self, name: str, lane: str) -> Iterator[None]:
        """Record the time that the block takes."""
        if not (self.on and self._timer.ready):
            yield
            return
        start = self._timer.mark()
        yield
        self._found.append((name, lane, start, self._timer.mark()))

    def until_arrival(self, name: str, arrival: Callable[[], T]) -> Callable[[], T]:
        """Record a transfer from now to its arrival. Returns the function to call in place of `arrival`.

        If the trace is on, a thread waits for the arrival, which may be earlier than the time when the caller asks. On
        a GPU it is the moment from which the caller's stream need not wait any more.
        """
        if not (self.on and self._timer.ready):
            return arrival
        start = self._timer.mark()
        return self._on_stream(name, arrival, start) if self._on_device else self._in_thread(name, arrival, start)

    def _on_stream(self, name: str, arrival: Callable[[], T], start: Moment) -> Callable[[], T]:
        def arrived() -> T:
            found = arrival()
            self._found.append((name, TRANSFER, start, self._timer.mark()))
            return found

        return arrived

    def _in_thread(self, name: str, arrival: Callable[[], T], start: Moment) -> Callable[[], T]:
        found: list[T] = []

        def wait() -> None:
            found.append(arrival())
            self._found.append((name, TRANSFER, start, self._timer.mark()))

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
