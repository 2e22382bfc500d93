"""Measures times on a machine that may be busy with other work: in two rounds, with a note where they differ.

It owns how often and in which order functions are timed, and when a result counts as unreliable; it must not know what
they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from longspan.clock import Run, repeated, seconds

_REPEATS = 8  # runs in a round
_LONG_S, _FEW = 1.0, 3  # what takes more seconds is run less often in a round
_AGREE = 0.1  # relative difference of two rounds from which on users are told

Report = Callable[[str], None]


def typical(taken: Sequence[float]) -> float:
    """The lower quartile: other work on the machine makes some timings much longer, and none shorter."""
    return sorted(taken)[len(taken) // 4]


class Bench:
    """Times functions on one device, in two rounds; `notes` has those whose rounds differ.

    Every measurement runs in a new thread with its own OpenMP workers. If more OpenMP workers exist than cores, even
    idle ones, they sleep between parallel loops, and a step takes 1.5 times as long. So the caller should set its own
    thread to one worker, and no engine should exist meanwhile.
    """

    def __init__(self, device: torch.device, cores: int, report: Report) -> None:
        self.device = device
        self.cores = cores
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.notes: list[str] = []
        self.report = report

    def seconds(self, what: str, run: Run) -> float:
        """Seconds of one function."""
        return self.rounds({what: run})[what]

    def rounds(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Seconds of each function by name: the mean of its typical times in two rounds over all functions.

        The speed of a shared machine changes within seconds, so two timings in a row would agree and prove little.
        """
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._rounds, runs).result()

    @torch.inference_mode()
    def _rounds(self, runs: Mapping[str, Run]) -> dict[str, float]:
        torch.set_num_threads(self.cores)
        found: list[dict[str, float]] = []
        for _ in range(2):
            found.append({})
            for what, run in runs.items():
                self.report(what)
                repeats = _FEW if seconds(run, self.device) > _LONG_S else _REPEATS
                found[-1][what] = typical(repeated(run, repeats, self.device))
        first, second = found
        return {what: self.agreed(what, first[what], second[what]) for what in runs}

    def agreed(self, what: str, first: float, second: float) -> float:
        """The mean of two timings; a note is added if they differ by more than 10 %."""
        low, high = min(first, second), max(first, second)
        if high > (1 + _AGREE) * low > 0:
            self.notes.append(f"{what}: two timings differ by {high / low - 1:.0%}; is the machine idle?")
        return (low + high) / 2

    def tensor(self, *shape: int) -> Tensor:
        """A tensor of random numbers."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)
