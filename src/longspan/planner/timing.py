"""Measures constants on a machine that may be busy with other work: two rounds, and a note where they disagree.

It owns how often and in which order things are timed, and when a result is called unreliable; it must not know what it
times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from longspan.clock import Run, repeated, seconds

_REPEATS = 8
_LONG_S = 1.0  # what takes longer is repeated less
_FEW = 3
_AGREE = 0.1

Report = Callable[[str], None]


def typical(taken: Sequence[float]) -> float:
    """The lower quartile: what else runs on a machine makes some timings much longer, and none shorter."""
    return sorted(taken)[len(taken) // 4]


class Bench:
    """Times things twice on one device, in two rounds through all of them; what does not agree is noted.

    Each time in a thread of its own: where more threads exist for parallel loops than cores, even idle ones, OpenMP's
    workers sleep between loops, and a model's step takes half as long again. The caller should leave its own at one.
    """

    def __init__(self, device: torch.device, cores: int, report: Report) -> None:
        self.device = device
        self.cores = cores
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.notes: list[str] = []
        self.report = report

    def seconds(self, what: str, run: Run) -> float:
        """What one thing takes."""
        return self.rounds({what: run})[what]

    def rounds(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """What each takes by name: the mean of two typical times, between which all others are timed.

        A shared machine's speed changes within seconds, so that neighbours in time are alike and say little.
        """
        with ThreadPoolExecutor(1) as apart:
            return apart.submit(self._rounds, runs).result()

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
        """The mean of two, and a note if they are far apart."""
        low, high = min(first, second), max(first, second)
        if high > (1 + _AGREE) * low > 0:
            self.notes.append(f"{what}: two timings differ by {high / low - 1:.0%}; is the machine idle?")
        return (low + high) / 2

    def tensor(self, *shape: int) -> Tensor:
        """Random numbers."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)
