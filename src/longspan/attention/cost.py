"""What each schedule would take, in seconds and bytes, and which is the cheapest.

It owns what the formulas of schedules share, and the choice; pure Python. It gets the schedules, counts (workload) and
constants, measured at start-up or of a named machine, and must not know where they come from, nor which rank asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from longspan.attention.workload import (
    AttentionShape,
    ComputeLoad,
    ExpansionCost,
    GroupShape,
    PhaseWorkload,
    WorkloadTotals,
)
from longspan.config import CostConstants, Fixed, require_choice
from longspan.plan.reach import Moves


class LayerTime(NamedTuple):
    """What one layer takes under a schedule, in seconds."""

    # whatever the sizes: calls and latencies
    fixed: float
    # until the busiest rank has attended
    compute: float
    # until the busiest member has taken in what is sent to it
    transfer: float
    # packing and merging
    copies: float
    # what of the transfer goes on beside computing
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """In all."""
        return self.fixed + self.compute + self.transfer + self.copies - self.hidden


@dataclass(frozen=True)
class Estimate:
    """One schedule's cost for one layer."""

    schedule: str
    # that the whole group sends
    bytes: int
    time: LayerTime

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.time.seconds


class Priced(Protocol):
    """What the cost model asks of a schedule's record, which is torch's (`attention/schedules/base.py`)."""

    @property
    def name(self) -> str:
        """The schedule's name."""
        ...

    @property
    def moves(self) -> Moves | None:
        """What travels, if anything does."""
        ...

    def bytes(self, step: StepTotals, /) -> int:
        """That the whole group sends for one layer."""
        ...

    def seconds(self, step: StepTotals, /) -> LayerTime:
        """What one layer takes."""
        ...


@dataclass(frozen=True)
class CostModel:
    """What attention takes under each schedule, for one layer's shape, group and machine."""

    shape: AttentionShape
    group: GroupShape
    # by name
    schedules: Mapping[str, Priced]
    constants: CostConstants = field(default_factory=CostConstants)
    # what keys that travel may fill at once
    workspace_tokens: int = 16384

    @cached_property
    def moving(self) -> tuple[Priced, ...]:
        """The schedules under which something travels."""
        return tuple(schedule for schedule in self.schedules.values() if schedule.moves is not None)

    def estimates(self, workload: PhaseWorkload) -> list[Estimate]:
        """Every schedule that could carry out the step."""
        step = StepTotals(self, workload.totals(self.group.members))
        return [Estimate(each.name, each.bytes(step), each.seconds(step)) for each in self.moving]

    def compute(
        self, loads: Sequence[ComputeLoad], heads: int, ranks_per_load: int = 1, visitors: bool = False
    ) -> float:
        """Seconds until the busiest rank has attended, with `heads` query heads each; visitors stay absorbed."""
        at, shape, seconds = self.constants, self.shape, []
        width, row = shape.head_dim + shape.out_dim, shape.kv_bytes * at.read_s
        expansion = ExpansionCost() if visitors else shape.expansion
        for load in loads:
            products = load.pairs * width - expansion.saved(load.pairs, load.reads)
            pairs = 2 * products * at.flop_s + load.pairs * at.pair_s
            seconds.append(pairs * heads + load.reads * row)
        together = sum(seconds) * ranks_per_load / (at.parallelism or self.group.members)
        return max(*seconds, together)

    def exchange(self, received: float) -> float:
        """Seconds of collectives in which the busiest member takes in `received` bytes, from all others alike."""
        at, members = self.constants, self.group.members
        outside = max(members - len(node) for node in self.group.nodes)
        crossing = received * outside / max(members - 1, 1)
        return max((received - crossing) * at.byte_s, crossing * at.cross_byte_s)


class StepTotals:
    """A step's totals under a model, and what several formulas need of them, each worked out once."""

    def __init__(self, model: CostModel, totals: WorkloadTotals) -> None:
        self.model, self.totals = model, totals

    def cheapest(self) -> Priced:
        """The schedule that could carry out the step in the fewest seconds."""
        return min(self.model.moving, key=lambda schedule: schedule.seconds(self).seconds)

    @cached_property
    def queries(self) -> tuple[float, float, float]:
        """(bytes of queries the busiest member takes in, of states, of states it packs and merges)."""
        shape, members, rows = self.model.shape, self.model.group.members, self.totals.rows
        each, most = self.model.group.members_per_pcp, max(rows)
        arriving = (sum(rows) * each - min(rows)) * shape.query_bytes
        returning = (members - 1) * most * shape.state_bytes
        handled = sum(rows) * each * shape.state_bytes + members * most * shape.state_bytes
        return arriving, returning, handled

    @cached_property
    def query_compute(self) -> float:
        """Heads of a whole DCP group meet on a shard; expanding is not possible for visitors."""
        heads = self.model.shape.q_heads * self.model.group.members_per_pcp
        return self.model.compute(self.totals.by_shard, heads, visitors=True)

    @cached_property
    def query_calls(self) -> int:
        """Calls on the busiest shard beyond one for each pcp index with rows."""
        return max(load.calls for load in self.totals.by_shard) - sum(rows != 0 for rows in self.totals.rows)

    @cached_property
    def key_compute(self) -> float:
        """Of the busiest rank when keys come to it."""
        return self.model.compute(self.totals.by_pcp, self.model.shape.q_heads, self.model.group.members_per_pcp)

    @cached_property
    def key_calls(self) -> int:
        """Calls of the busiest rank beyond one for each shard."""
        return max(load.calls for load in self.totals.by_pcp) - self.model.group.members

    def queries_sent(self) -> int:
        """Bytes the group sends when queries travel: every member's to all others, each of which returns a state.

        A ring and a tree move the same bytes another way.
        """
        shape, group = self.model.shape, self.model.group
        each_way = shape.query_bytes + shape.state_bytes
        return (group.members - 1) * group.members_per_pcp * sum(self.totals.rows) * each_way

    def keys_sent(self) -> int:
        """Bytes the group sends when keys travel: each needed token's to all others."""
        return (self.model.group.members - 1) * sum(self.totals.needed) * self.model.shape.kv_bytes

    def keys(self, block: int) -> tuple[float, float, int]:
        """(bytes the busiest member takes in, bytes copied and merged, rounds) when keys travel in blocks of tokens."""
        shape, members, needed = self.model.shape, self.model.group.members, self.totals.needed
        rounds = max(1, -(-max(needed, default=0) // max(block, 1)))
        arriving = (sum(needed) - min(needed)) * shape.kv_bytes
        merged = rounds * members * 2 * max(self.totals.rows) * shape.state_bytes
        own = max(needed) * shape.kv_bytes
        return arriving, own + merged, rounds

    def fixed(self, schedule: str, messages: int, more_calls: int) -> float:
        """Seconds that do not depend on sizes: as measured, or the latency of so many collectives and one call.

        `more_calls` are those of kernels beyond what was measured.
        """
        at, rows = self.model.constants, self.totals.rows
        latency = at.message_s if len(self.model.group.nodes) == 1 else at.cross_message_s
        measured = at.fixed.get(schedule) or Fixed(messages * latency + at.call_s, messages * latency + at.call_s)
        share = (sum(count != 0 for count in rows) - 1) / max(len(rows) - 1, 1)
        return measured.one + share * (measured.all - measured.one) + max(more_calls, 0) * at.call_s

    def hidden(self, compute: float, circulating: float) -> float:
        """A ring of n computes n blocks and moves n − 1: each move goes on beside a block."""
        members = self.model.group.members
        return self.model.constants.hidden * min(compute * (members - 1) / members, circulating)


@dataclass(frozen=True)
class ScheduleChooser:
    """Chooses a schedule for a phase: what the user forced, or the fewest seconds."""

    model: CostModel
    forced: str = "auto"

    def __post_init__(self) -> None:
        require_choice("schedule", self.forced, ("auto", *self.model.schedules))

    def choose(self, workload: PhaseWorkload) -> str:
        """`local` if nothing travels; else the forced schedule, or the cheapest."""
        if not sum(workload.rows):
            return "local"
        if self.forced != "auto":
            return self.forced
        return StepTotals(self.model, workload.totals(self.model.group.members)).cheapest().name
