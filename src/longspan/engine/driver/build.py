"""Builds the core: offload files, cache, role, ranks and scheduler, in the order of their dependencies.

It owns this order, and closes the parts that are open if a later one cannot be built.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from longspan.attention.cost import ScheduleChooser
from longspan.cache.manager import CacheManager
from longspan.cache.offload import OffloadIndex
from longspan.cache.prefix import root_key
from longspan.config import CostConstants
from longspan.disaggregation.roles import open_role
from longspan.engine.driver.core import EngineCore
from longspan.engine.driver.executors.base import Executor
from longspan.engine.driver.executors.dry import DryExecutor
from longspan.engine.driver.executors.external import ExternalExecutor
from longspan.engine.driver.executors.processes import ProcessExecutor
from longspan.engine.driver.executors.ray import RayExecutor
from longspan.engine.driver.executors.threads import ThreadExecutor
from longspan.engine.rank.build import build_vocabulary
from longspan.engine.rank.page_store import OffloadFiles
from longspan.engine.rank.short_steps import short_sizes
from longspan.engine.setup import EngineSetup
from longspan.scheduler.scheduler import Scheduler
from longspan.scheduler.sequence import Grammars


def build_core(setup: EngineSetup) -> EngineCore:
    """Start the ranks and build a core on them. Raises `ConfigError`, `ModelError` or `EngineError`."""
    config, cached = setup.config, setup.config.cache
    # the ranks' setup has the paths of the offload files and the address of the role, so both come before the executor
    with ExitStack() as undo:
        offload = OffloadFiles(setup) if cached.offload.is_on else None
        index = None
        if offload is not None:
            undo.callback(offload.close)
            index = OffloadIndex(offload.memory_slots, offload.disk_slots)
            setup = offload.setup
        root = root_key(setup.source.name, f"{setup.dtype}/{setup.cache_dtype}", cached.page_size)
        role = open_role(setup, lambda: cache, root, lambda: setup.limits)
        if role is not None:
            undo.callback(role.close)
            setup = replace(setup, config=replace(setup.config, transfer=role.config))
        executor = create_executor(setup)
        undo.callback(executor.shutdown)
        setup = executor.setup  # now with the machine of every rank and the number of pages they have measured
        config = setup.config
        cache = CacheManager(cached.page_size, setup.pages_per_shard, cached.enable_prefix_caching, index)
        constants = config.cost or executor.constants or CostConstants()
        records = setup.records_decode or setup.records_calls
        short = max(short_sizes(setup), default=0)
        chooser = ScheduleChooser(setup.cost_model(constants), config.scheduler.schedule, records, short)
        grammars = _grammars(setup, executor)
        scheduler = Scheduler(
            config.scheduler, cache, setup.grid, chooser, root, setup.model.layer_groups, grammars, setup.drafts_ahead
        )  # fmt: skip
        core = EngineCore(setup, executor, cache, scheduler, constants, role, offload)
        undo.pop_all()
    return core


def _grammars(setup: EngineSetup, executor: Executor) -> Grammars | None:
    """What tells the scheduler which drafts a grammar allows; None without drafts."""
    if setup.config.scheduler.speculative is None:
        return None
    shared = executor.vocabulary if isinstance(executor, ThreadExecutor) else build_vocabulary(setup)
    return shared.matcher


def create_executor(setup: EngineSetup) -> Executor:
    """Start the executor that the configuration names."""
    kinds: dict[str, Callable[[EngineSetup], Executor]] = {
        "threads": ThreadExecutor,
        "processes": ProcessExecutor,
        "ray": RayExecutor,
        "external": ExternalExecutor,
        "dry": DryExecutor,
    }
    return kinds[setup.config.executor](setup)
