"""How much memory a rank has for its cache: measured, by the steps that need the most beside it.

It owns what is run and how bytes are counted; the steps are those of `warmup.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch

from longspan.engine.memory_use import GIB, MemoryUse
from longspan.engine.rank.draft_graphs import DraftGraphs
from longspan.engine.rank.graphs import GraphRunner
from longspan.engine.rank.runner import Runner
from longspan.engine.rank.warmup import largest_plans, pages_for_largest
from longspan.engine.setup import EngineSetup
from longspan.errors import ConfigError
from longspan.plan.plan import StepPlan


class DeviceMemory(Protocol):
    """The memory of one device."""

    def free(self) -> int:
        """Bytes that are free, once PyTorch has given back what it holds without need."""

    def peak_of(self, run: Callable[[], None]) -> int:
        """Bytes that `run` needs at its peak, beyond what is held before it. Fragments between tensors count."""


class CudaMemory:
    """See `DeviceMemory`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """See `DeviceMemory.free`."""
        torch.cuda.synchronize(self._device)
        gc.collect()  # a CUDA graph may be part of a cycle
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_of(self, run: Callable[[], None]) -> int:
        """See `DeviceMemory.peak_of`."""
        self.free()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - before


def measure(
    setup: EngineSetup,
    memory: DeviceMemory,
    at_start: int,
    build: Callable[[EngineSetup], tuple[Runner, GraphRunner | DraftGraphs | None]],
) -> MemoryUse:
    """Measure a rank's memory with a small cache. All ranks must do so at the same time.

    Args:
        setup: the setup, whose number of pages is to be found.
        memory: the device's memory; the weights are in it already.
        at_start: bytes that were free before.
        build: builds the rank with the cache of a setup: a runner without CUDA graphs, and the graphs.
    """
    pilot = setup.with_pages(pages_for_largest(setup))
    runner, graphs = build(pilot)
    workspace = memory.peak_of(partial(_run, runner, list(largest_plans(pilot))))
    recordings = 0 if graphs is None else _recordings(graphs, pilot, memory)
    del runner, graphs  # with the small cache
    return MemoryUse(
        free=at_start,
        usable=int(at_start * setup.config.cache.gpu_memory_utilization),
        loaded=at_start - memory.free(),
        workspace=workspace,
        recordings=recordings,
        page=setup.layout.bytes_per_token * setup.config.cache.page_size,
    )


def require_room(use: MemoryUse, utilisation: float) -> None:
    """Raise `ConfigError` unless all ranks have room for a page."""
    if use.pages > 0:
        return
    needed = use.loaded + use.workspace + use.recordings + use.page
    raise ConfigError(
        "gpu_memory_utilization", utilisation,
        f"a rank needs {needed / GIB:.1f} GiB (weights and kernels {use.loaded / GIB:.1f}, workspace "
        f"{use.workspace / GIB:.1f}, CUDA graphs {use.recordings / GIB:.1f}); {use.free / GIB:.1f} GiB are free, "
        f"{use.usable / GIB:.1f} of them to be used, and another rank may have fewer",
        "lower --max-num-batched-tokens or --max-num-seqs, use --enforce-eager, more ranks or a smaller dtype",
    )  # fmt: skip


def _run(runner: Runner, plans: Sequence[StepPlan]) -> None:
    for plan in plans:
        runner.step(plan)


def _recordings(graphs: GraphRunner | DraftGraphs, setup: EngineSetup, memory: DeviceMemory) -> int:
    """Bytes of all CUDA graphs: the largest is recorded, and another one, which shows what each of the others adds.

    Those of steps with drafts are few and differ in kind, so all of them are recorded.
    """
    short, found = 0, [memory.free()]
    if isinstance(graphs, DraftGraphs):
        for _ in graphs.record():
            pass
        return max(0, found[0] - memory.free())
    for _ in graphs.record_one_by_one(setup.recorded_schedules):
        found.append(memory.free())
        if len(found) > 2:
            break
    if graphs.short is not None:
        short = memory.free()
        for _ in graphs.short.record():
            pass
        short -= memory.free()
    first, *others = [before - after for before, after in pairwise(found)]
    each = max(0, *others) if others else 0
    return max(0, short) + max(0, first) + each * (len(graphs.sizes) * len(setup.recorded_schedules) - 1)
