"""Timing on a CPU or a CUDA device: the time now, the seconds of one run or of several, and of a warm function.

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
_FEWEST, _MOST = 3, 100  # timed repetitions
_WARMUPS = 3
_LONG_S = 1.0  # a function whose first run takes longer is not warmed up further
_CAPTURED_S = 0.01  # a function that takes longer is not captured: the time of launches is hidden by the device's work
_FLUSH_BYTES = 256 << 20  # several times the largest L2 cache


def now(device: torch.device = _CPU) -> float:
    """Wait until the device is idle and return the time in seconds.

    The time is counted from an arbitrary moment, which is the same for all processes of a machine.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Run, device: torch.device = _CPU) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    started = now(device)
    run()
    return now(device) - started


def repeated(run: Run, repeats: int, device: torch.device = _CPU, before: Run | None = None) -> list[float]:
    """Seconds of each of `repeats` runs. `before` is called ahead of each and not timed."""
    found: list[float] = []
    for _ in range(repeats):
        if before is not None:
            before()
        found.append(seconds(run, device))
    return found


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a warm function."""

    median: float  # median of the timed repetitions
    best: float  # shortest of the timed repetitions
    runs: int  # number of timed repetitions
    captured: bool = False  # whether a CUDA graph was replayed, so that launches are not timed


class Clock:
    """Times warm functions on a CPU. `budget` is how many seconds the repetitions of one function may take."""

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
    """Times warm functions with CUDA events. The L2 cache is overwritten before each repetition."""

    def __init__(self, device: torch.device, budget: float) -> None:
        super().__init__(budget)
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, function: Run) -> Timing:
        """See `Clock.time`."""
        self._taken(function, 1)  # the first call may compile kernels
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
        """Capture the function as a CUDA graph; None if that is impossible, for example if it copies from the host."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay


def make_clock(device: torch.device, budget: float) -> Clock:
    """The clock for a device. `budget` is how many seconds the repetitions of one function may take."""
    return CudaClock(device, budget) if device.type == "cuda" else Clock(budget)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
