"""What every kernel benchmark runs on: device, clock, backends side by side, memory, and the row of a result.

It owns how a contestant's failure or a case too large becomes a row; it must not know what the cases are.
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

_USABLE = 0.8  # of the memory that is free


@dataclass(frozen=True)
class KernelRow:
    """One contestant on one case: what was done (bytes moved at least, floating-point operations), in what time.

    `problem` says why there is no time.
    """

    case: dict[str, str | int]
    backend: str
    bytes: int
    flops: int
    timing: Timing | None
    problem: str = ""


@dataclass(frozen=True)
class Harness:
    """A device ready to measure."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    ceilings: Ceilings
    backends: tuple[str, ...]
    progress: Callable[[str], None]

    def contestants(self, shape: BackendShape) -> dict[str, Backend]:
        """Of the backends asked for, or of all without a wish, those that can serve `shape`.

        Raises `ConfigError` if none of those asked for can.
        """
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
        """One row; `size` is bytes and operations. A kernel that fails leaves the other rows."""
        self.progress(f"{backend}: {', '.join(f'{name} {value}' for name, value in case.items())}")
        try:
            return KernelRow(case, backend, *size, self.clock.time(work))
        except Exception as error:  # whatever a compiler or a library raises
            return KernelRow(case, backend, *size, None, f"{type(error).__name__}: {str(error).strip()[:200]}")

    def lacks(self, needed: int) -> str:
        """Why `needed` bytes cannot be had; empty if they can."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free" if needed > _USABLE * free else ""


def make_harness(device: str, backends: Sequence[str], budget: float, progress: Callable[[str], None]) -> Harness:
    """A bed on `device`, cpu or cuda, its ceilings measured; `budget` is seconds for each case.

    Raises `ConfigError` for a device or a backend that is not there.
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
    """A row as plain data: seconds, bytes and operations a second, and both as shares of the ceilings."""
    plain: dict[str, Any] = {**row.case, "backend": row.backend, "bytes": row.bytes, "flops": row.flops}
    if row.timing is None:
        return {**plain, "problem": row.problem}
    seconds = row.timing.median
    return {
        **plain, **asdict(row.timing),
        "bytes_per_s": row.bytes / seconds, "share_of_copy": row.bytes / seconds / ceilings.copy,
        "flops_per_s": row.flops / seconds, "share_of_matmul": row.flops / seconds / ceilings.matmul,
    }  # fmt: skip
