"""What a rank has measured of its GPU's memory at start.

It owns this record and its wording; `rank/profile.py` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank's GPU."""

    # free before anything was loaded
    free: int
    # part of it that may be used: `gpu_memory_utilization` of it
    usable: int
    # weights, kernels and buffers of collectives
    loaded: int
    # the most that a step adds
    workspace: int
    # CUDA graphs, with their buffers
    recordings: int
    # one page
    page: int
    # number of pages, as all ranks have agreed
    pages: int = 0

    @property
    def room(self) -> int:
        """Number of pages that this rank has room for; zero or negative if none fits."""
        return (self.usable - self.loaded - self.workspace - self.recordings) // self.page

    @property
    def note(self) -> str:
        """A line for the start."""
        return (
            f"GPU memory of a rank, of {self.free / GIB:.1f} GiB free at start: weights and kernels "
            f"{self.loaded / GIB:.1f}, workspace {self.workspace / GIB:.1f}, CUDA graphs {self.recordings / GIB:.1f}, "
            f"KV cache {self.pages * self.page / GIB:.1f}"
        )
