"""How the cores of a machine are shared among its ranks."""

from __future__ import annotations

import os

from longspan.config import EngineConfig


def threads_per_rank(config: EngineConfig) -> int:
    """CPU threads that a rank may use: the user's number, or an even share of this machine's cores."""
    return config.num_threads or share_of_cores(config.parallel.world_size)


def share_of_cores(ranks: int) -> int:
    """The cores that this process may use divided by `ranks`, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)
