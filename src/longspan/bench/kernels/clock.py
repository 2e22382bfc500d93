"""Times one function on one device: warm, many times, with cold caches where the device lets us.

It owns clocks, repetitions and the measured ceilings; it must not know what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

_FEWEST, _MOST = 3, 100  # counted repetitions
_WARMUPS = 3
_LONG_S = 1.0  # a function that takes longer is not warmed up again
_CAPTURED_S = 0.01  # what takes longer is not captured: launches hide behind the work
_FLUSH_BYTES = 256 << 20  # several times the largest cache
_COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 768}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call. `captured`: replayed as a CUDA graph, so that launching costs nothing."""

    median: float
    best: float
    runs: int
    captured: bool = False


class Clock(Protocol):
    """Times a function."""

    def time(self, function: Callable[[], object]) -> Timing: ...


class CpuClock:
    """Wall clock; `budget` is the seconds that one function's repetitions may take."""

    def __init__(self, budget: float) -> None:
        self._budget = budget

    def time(self, function: Callable[[], object]) -> Timing:
        """See `Clock.time`."""
        taken = [_wall(function)]
        if taken[0] < _LONG_S:
            taken = [_wall(function) for _ in range(_WARMUPS)]
        taken = [_wall(function) for _ in range(_repetitions(min(taken), self._budget))]
        return Timing(median(taken), min(taken), len(taken))


class CudaClock:
    """Device events, with the second-level cache overwritten before each repetition."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self._budget = budget
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, function: Callable[[], object]) -> Timing:
        """See `Clock.time`."""
        self._events(function, 1)  # compiles
        took = self._events(function, 1)[0]
        if took < _LONG_S:
            took = min(self._events(function, _WARMUPS))
        replay = self._captured(function) if took < _CAPTURED_S else None
        taken = self._events(replay or function, _repetitions(took, self._budget))
        return Timing(median(taken), min(taken), len(taken), replay is not None)

    def _events(self, function: Callable[[], object], count: int) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(count)]
        for start, stop in pairs:
            self._flushed.zero_()
            start.record()
            function()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]

    def _captured(self, function: Callable[[], object]) -> Callable[[], object] | None:
        """None where the function does what a graph cannot hold, such as copies from the host."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best here and now: a large copy, bytes read and written a second, and a large matrix
    product, floating-point operations a second."""

    copy: float
    matmul: float


def make_clock(device: torch.device, budget: float) -> Clock:
    """The device's clock; `budget` in seconds for each function."""
    return CudaClock(device, budget) if device.type == "cuda" else CpuClock(budget)


def measure_ceilings(clock: Clock, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both ceilings, the product in `dtype`."""
    source = torch.randint(0, 255, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = clock.time(lambda: target.copy_(source)).median
    size = _MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    matmul = clock.time(lambda: torch.mm(a, b, out=product)).median
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / matmul)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _repetitions(seconds: float, budget: float) -> int:
    return max(_FEWEST, min(_MOST, int(budget / max(seconds, 1e-6))))
