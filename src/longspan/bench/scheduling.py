"""Time the scheduler's work for one decode step, without a model, by number of requests and length of context.

It owns the setup of a scheduler without ranks; tokens are made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import AttentionShape, GroupShape
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import root_key
from longspan.config import ParallelConfig, SchedulerConfig
from longspan.parallel.grid import Grid
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.request import CoreRequest, SampledToken, SamplingParams
from longspan.scheduler.scheduler import Scheduler

_CHUNK = 1 << 20
_SHAPE = AttentionShape(q_heads=8, kv_heads=1, head_dim=128, element_bytes=2)


def run_scheduling(
    running: int, contexts: Sequence[int], shards: int, page_size: int, steps: int, on_progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each context length: median µs per step of `schedule`, `commit` and the plan's encoding."""
    rows = []
    for context in contexts:
        on_progress(f"{running} requests of {context:,} tokens")
        scheduler = _filled(running, context, shards, page_size, steps)
        times = [_timed_step(scheduler) for _ in range(steps)]
        schedule, commit, encode = (median(column) * 1e6 for column in zip(*times, strict=True))
        rows.append(
            {
                "running": running, "context": context, "schedule_us": schedule, "commit_us": commit,
                "encode_us": encode, "total_us": schedule + commit + encode,
            }
        )  # fmt: skip
    return rows


def _filled(running: int, context: int, shards: int, page_size: int, steps: int) -> Scheduler:
    """A scheduler with `running` requests that have just finished their prefill."""
    pages = running * (2 + (context + steps + 2) // page_size // shards + 1)
    cache = CacheManager(page_size, (pages,) * shards, False)
    config = SchedulerConfig(
        max_num_batched_tokens=_CHUNK + running, max_num_seqs=running, max_model_len=context + steps + 2,
        local_context=0,
    )  # fmt: skip
    grid = Grid(ParallelConfig(1, shards, 1))
    group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)))
    chooser = ScheduleChooser(CostModel(_SHAPE, group, SCHEDULES))
    key = root_key("bench", "bf16", page_size)
    scheduler = Scheduler(config, cache, grid, chooser, key)
    prompt = [1] * context
    for number in range(running):
        scheduler.add(CoreRequest(str(number), prompt, SamplingParams(temperature=0), 0, steps + 2))
    while any(s.computed < context for s in scheduler.running) or scheduler.waiting:
        _timed_step(scheduler)
    return scheduler


def _timed_step(scheduler: Scheduler) -> tuple[float, float, float]:
    started = time.perf_counter()
    plan = scheduler.schedule()
    planned = time.perf_counter()
    if plan is None:
        return 0.0, 0.0, 0.0
    plan.encode()
    encoded = time.perf_counter()
    scheduler.commit(plan, _made_up(plan))
    return planned - started, time.perf_counter() - encoded, encoded - planned


def _made_up(plan: StepPlan) -> StepResult:
    return StepResult(tuple(SampledToken(segment.request_id, 1) for segment in plan.segments if segment.sample))
