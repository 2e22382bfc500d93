"""The harness of all kernel benchmarks: device, clock, backends, a check of memory, and rows of results.

It owns how the failure of a backend, or a case that is too large, becomes a row; it must not know what the cases are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longspan.attention.backends import BACKENDS
from longspan.attention.backends.base import Backend, BackendShape
from longspan.attention.backends.choice import choose_backend
from longspan.bench.kernels.ceilings import Ceilings, measure_ceilings
from longspan.clock import Clock, Timing, make_clock
from longspan.errors import ConfigError

_USABLE = 0.8  # fraction of the free memory that a case may take


@dataclass(frozen=True)
class KernelRow:
    """The result of one backend on one case."""

    # the columns that identify the case
    case: dict[str, str | int]
    # the backend's name; "-" if the case was not run
    backend: str
    # the least bytes that have to be moved
    bytes: int
    # floating-point operations
    flops: int
    # None if the kernel failed or was not run
    timing: Timing | None
    # why there is no timing
    problem: str = ""
    # the largest error against fp64, relative to the largest element; None where it is not compared for each row
    error: float | None = None
    # the command that measures this row alone, where there is one
    command: str = ""


@dataclass(frozen=True)
class Harness:
    """A device with everything that measurements need."""

    # where kernels run
    device: torch.device
    # of queries and of caches that are not quantised
    dtype: torch.dtype
    # times the kernels
    clock: Clock
    # the device's best rates
    ceilings: Ceilings
    # names of the backends to measure; empty: all
    backends: tuple[str, ...]
    # called with a line about each measurement
    progress: Callable[[str], None]

    def contestants(self, shape: BackendShape) -> dict[str, Backend]:
        """The backends to measure that support `shape`, by name. Raises `ConfigError` if none does."""
        found: dict[str, Backend] = {}
        problem: ConfigError | None = None
        for name in self.backends or BACKENDS:
            try:
                found[name] = choose_backend(name, self.device.type, shape).record.build(self.device, shape)
            except ConfigError as error:
                problem = error
        if problem and not found:
            raise problem
        return found

    def measure(
        self, case: dict[str, str | int], backend: str, size: tuple[int, int], work: Callable[[], object]
    ) -> KernelRow:
        """Time `work` and return a row. `size` is (bytes, operations). A failure gives a row without a timing."""
        self.progress(f"{backend}: {', '.join(f'{name} {value}' for name, value in case.items())}")
        try:
            return KernelRow(case, backend, *size, self.clock.time(work))
        except Exception as error:  # compilers and libraries raise many types
            return KernelRow(case, backend, *size, None, f"{type(error).__name__}: {str(error).strip()[:200]}")

    def lacks(self, needed: int) -> str:
        """Why `needed` bytes cannot be allocated; empty if they can."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free" if needed > _USABLE * free else ""


def make_harness(device: str, backends: Sequence[str], budget: float, progress: Callable[[str], None]) -> Harness:
    """Make a harness and measure the device's ceilings.

    `device` is `cpu` or `cuda`, `budget` the seconds that the repetitions of one case may take. Raises `ConfigError`
    for a device that this machine lacks, or an unknown backend.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", device, "PyTorch sees no such device", "use --device cpu")
    for name in backends:
        if name not in BACKENDS:
            raise ConfigError("backends", name, "is unknown", f"choose among {', '.join(BACKENDS)}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.device(device)
    clock = make_clock(where, budget)
    progress("measuring the device's ceilings")
    return Harness(where, dtype, clock, measure_ceilings(clock, where, dtype), tuple(backends), progress)


def as_json(row: KernelRow, ceilings: Ceilings) -> dict[str, Any]:
    """A row as JSON: seconds, bytes and operations per second, and the last two as shares of the ceilings."""
    plain: dict[str, Any] = {**row.case, "backend": row.backend, "bytes": row.bytes, "flops": row.flops}
    plain |= {} if row.error is None else {"error": row.error}
    plain |= {"command": row.command} if row.command else {}
    if row.timing is None:
        return {**plain, "problem": row.problem}
    seconds = row.timing.median
    return {
        **plain, **asdict(row.timing),
        "bytes_per_s": row.bytes / seconds, "share_of_copy": row.bytes / seconds / ceilings.copy,
        "flops_per_s": row.flops / seconds, "share_of_matmul": row.flops / seconds / ceilings.matmul,
    }  # fmt: skip
