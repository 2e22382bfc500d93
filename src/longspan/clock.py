"""Seconds of what runs on a CPU or a CUDA device: a reading, one run, runs in a row, a function once it is warm.

It owns waiting for the device, warm-up and repetitions; it must not know what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

Run = Callable[[], object]

_CPU = torch.device("cpu")
_FEWEST, _MOST = 3, 100  # counted repetitions
_WARMUPS = 3
_LONG_S = 1.0  # a function that takes longer is not warmed up again
_CAPTURED_S = 0.01  # what takes longer is not captured: launches hide behind the work
_FLUSH_BYTES = 256 << 20  # several times the largest cache


def now(device: torch.device = _CPU) -> float:
    """Seconds since some moment, the same for all processes of a machine, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Run, device: torch.device = _CPU) -> float:
    """What one run takes, from an idle device to an idle device."""
    started = now(device)
    run()
    return now(device) - started


def repeated(run: Run, repeats: int, device: torch.device = _CPU, before: Run | None = None) -> list[float]:
    """The seconds of each run; `before` each of them comes what does not count."""
    found: list[float] = []
    for _ in range(repeats):
        if before is not None:
            before()
        found.append(seconds(run, device))
    return found


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    best: float
    runs: int  # counted repetitions
    captured: bool = False  # replayed as a CUDA graph, so that launching costs nothing


class Clock:
    """Wall clock of a warm function on a CPU; `budget` is the seconds that one function's repetitions may take."""

    def __init__(self, budget: float) -> None:
        self._budget = budget

    def time(self, function: Run) -> Timing:
        """Warm up, then repeat as often as the budget allows."""
        taken = self._taken(function, self._repetitions(self._warm(function)))
        return Timing(median(taken), min(taken), len(taken))

    def _warm(self, function: Run) -> float:
        took = self._taken(function, 1)[0]
        return took if took >= _LONG_S else min(self._taken(function, _WARMUPS))

    def _repetitions(self, took: float) -> int:
        return max(_FEWEST, min(_MOST, int(self._budget / max(took, 1e-6))))

    def _taken(self, function: Run, count: int) -> list[float]:
        return repeated(function, count)


class CudaClock(Clock):
    """Device events, with the second-level cache overwritten before each repetition."""

    def __init__(self, device: torch.device, budget: float) -> None:
        super().__init__(budget)
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, function: Run) -> Timing:
        """See `Clock.time`."""
        self._taken(function, 1)  # compiles
        took = self._warm(function)
        replay = self._captured(function) if took < _CAPTURED_S else None
        taken = self._taken(replay or function, self._repetitions(took))
        return Timing(median(taken), min(taken), len(taken), replay is not None)

    def _taken(self, function: Run, count: int) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(count)]
        for start, stop in pairs:
            self._flushed.zero_()
            start.record()
            function()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]

    def _captured(self, function: Run) -> Run | None:
        """None where the function does what a graph cannot hold, such as copies from the host."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay


def make_clock(device: torch.device, budget: float) -> Clock:
    """The device's clock; `budget` in seconds for each function."""
    return CudaClock(device, budget) if device.type == "cuda" else Clock(budget)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
