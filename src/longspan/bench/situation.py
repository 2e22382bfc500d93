"""One request with given numbers of cached and new tokens, as the scheduler places it on a grid.

It owns bringing a scheduler without ranks into that state; benchmarks and `explain` read the plan and the workload.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longspan.attention.cost import CostModel, Estimate, ScheduleChooser
from longspan.attention.workload import PhaseWorkload
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import root_key
from longspan.config import SchedulerConfig
from longspan.parallel.grid import Grid
from longspan.plan.mirror import Mirror
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.request import CoreRequest, SamplingParams
from longspan.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Situation:
    """A step that computes new tokens of one request, whose cached tokens are spread over all shards."""

    # the layout
    grid: Grid
    # tokens that the step computes
    new: int
    # tokens stored before it
    cached: int
    # tokens of a page
    page_size: int = 16
    # window of each layer group; None: full attention
    windows: tuple[int | None, ...] = (None,)

    @property
    def pages(self) -> int:
        """Pages of each shard: enough for the whole request on one shard."""
        return 1 + -(-(self.new + self.cached) // self.page_size)


@dataclass(frozen=True)
class _Recorder(ScheduleChooser):
    """A chooser that records the workloads for which it was asked to choose."""

    # in the order of the calls
    asked: list[PhaseWorkload] = field(default_factory=list)

    def choose(self, workload: PhaseWorkload, decode: bool = False, rows: int | None = None) -> str:
        self.asked.append(workload)
        return super().choose(workload, decode, rows)


@dataclass(frozen=True)
class LaidOut:
    """The step of a situation, planned but not computed."""

    # the step's plan
    plan: StepPlan
    # the page tables that a rank has after the plan
    mirror: Mirror
    # the workload of each layer group
    workloads: tuple[PhaseWorkload, ...]

    def under(self, schedule: str) -> StepPlan:
        """The same plan with `schedule` in place of every schedule that is not `local`."""

        def forced(schedules: tuple[str, ...]) -> tuple[str, ...]:
            return tuple("local" if old == "local" else schedule for old in schedules)

        decode, prefill = forced(self.plan.decode_schedules), forced(self.plan.prefill_schedules)
        return replace(self.plan, decode_schedules=decode, prefill_schedules=prefill)


def lay_out(situation: Situation, model: CostModel) -> LaidOut:
    """Schedule the cached tokens in one step and the new tokens in another, without computing either."""
    length = situation.cached + situation.new
    grid = situation.grid
    cache = CacheManager(situation.page_size, (situation.pages,) * grid.num_shards, False)
    chooser = _Recorder(model)
    config = SchedulerConfig(max_num_batched_tokens=max(situation.cached, 1), max_num_seqs=1, local_context=0)
    scheduler = Scheduler(config, cache, grid, chooser, root_key("situation"), situation.windows)
    scheduler.add(CoreRequest("0", [0] * length, SamplingParams(temperature=0), 0, 1))
    mirror = Mirror(situation.page_size, grid.num_shards)
    if situation.cached:
        plan = _next(scheduler)
        mirror.apply(plan)
        scheduler.commit(plan, StepResult())
    # the next step has exactly the new tokens
    scheduler.config = SchedulerConfig(max_num_batched_tokens=situation.new, max_num_seqs=1, local_context=0)
    chooser.asked.clear()
    plan = _next(scheduler)
    mirror.apply(plan)
    decode, prefill = chooser.asked[: len(situation.windows)], chooser.asked[len(situation.windows) :]
    return LaidOut(plan, mirror, tuple(prefill if plan.segments[0].prefill else decode))


def _next(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    if plan is None:
        raise ValueError("nothing to schedule: the situation has no room for its request")
    return plan


def estimates(situation: Situation, model: CostModel) -> list[list[Estimate]]:
    """For each layer group the estimates of all schedules, fastest first; empty if nothing has to travel."""
    return [
        sorted(model.estimates(workloads), key=lambda e: e.seconds) if sum(workloads.rows) else []
        for workloads in lay_out(situation, model).workloads
    ]
