"""The cost model: the seconds and bytes of each schedule for a workload, and the choice of the cheapest one.

It owns what the formulas of the schedules share, and the choice. Pure Python: it is given schedules, workloads and
constants (measured at start, or of a named machine), and must not know where they come from, nor which rank asks.
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
    """The time of one layer under a schedule, in seconds."""

    # calls and latencies, which do not depend on sizes
    fixed: float
    # attention on the busiest rank
    compute: float
    # transfers to the member that receives most
    transfer: float
    # packing and merging of states
    copies: float
    # part of the transfer that overlaps with computing
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """Total time."""
        return self.fixed + self.compute + self.transfer + self.copies - self.hidden


@dataclass(frozen=True)
class Estimate:
    """The cost of one layer under one schedule."""

    # name of the schedule
    schedule: str
    # bytes that all members of the group send
    bytes: int
    # the time and its parts
    time: LayerTime

    @property
    def seconds(self) -> float:
        """Total time in seconds."""
        return self.time.seconds


class Priced(Protocol):
    """The part of a `Schedule` that the cost model uses. It has no tensors, so this module does not import torch."""

    @property
    def name(self) -> str:
        """The schedule's name."""
        ...

    @property
    def moves(self) -> Moves | None:
        """What travels; None if nothing does."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can contain it."""
        ...

    def bytes(self, step: StepTotals, /) -> int:
        """Bytes that all members of the group send for one layer."""
        ...

    def seconds(self, step: StepTotals, /) -> LayerTime:
        """Time of one layer."""
        ...


@dataclass(frozen=True)
class CostModel:
    """The cost of attention under each schedule, for a layer's shape, a context group and a machine."""

    # sizes of one layer on one rank
    shape: AttentionShape
    # the context group
    group: GroupShape
    # schedules by name
    schedules: Mapping[str, Priced]
    # rates and latencies of the machine
    constants: CostConstants = field(default_factory=CostConstants)
    # most tokens whose keys a rank gathers at once
    workspace_tokens: int = 16384

    @cached_property
    def moving(self) -> tuple[Priced, ...]:
        """The schedules under which something travels, of those that this group can have."""
        unable = (None,) if self.group.maps_pools else (None, "signals")
        return tuple(schedule for schedule in self.schedules.values() if schedule.moves not in unable)

    def estimates(self, workload: PhaseWorkload) -> list[Estimate]:
        """The cost of every schedule under which something travels."""
        step = StepTotals(self, workload.totals(self.group.members))
        return [Estimate(each.name, each.bytes(step), each.seconds(step)) for each in self.moving]

    def compute(
        self, loads: Sequence[ComputeLoad], heads: int, ranks_per_load: int = 1, visitors: bool = False
    ) -> float:
        """Seconds of attention on the busiest rank.

        Args:
            loads: what is computed in each place: on each shard, or on each pcp index.
            heads: query heads of a rank.
            ranks_per_load: number of ranks that compute each load.
            visitors: whether the queries come from other ranks; then latents are not expanded.
        """
        at, shape, seconds = self.constants, self.shape, []
        width, row = shape.head_dim + shape.out_dim, shape.kv_bytes * at.read_s
        expansion = ExpansionCost() if visitors else shape.expansion
        for load in loads:
            products = load.pairs * width - expansion.saved(load.pairs, load.reads)
            pairs = 2 * products * at.flop_s + load.pairs * at.pair_s
            seconds.append(pairs * heads + load.reads * row)
        # where fewer ranks can run at once than there are, they share the cores
        at_once = at.parallelism or self.group.members
        together = sum(seconds) * ranks_per_load / at_once
        if self.group.shares_cores and not visitors:  # the ranks with rows have the cores of the others
            busy = sum(load.pairs != 0 for load in loads) * ranks_per_load
            seconds = [each * min(1.0, busy / at_once) for each in seconds]
        return max(*seconds, together)

    def exchange(self, received: float) -> float:
        """Seconds of a collective in which a member receives at most `received` bytes, equally from all others.

        On several machines the bytes from this machine and those from others are received at the same time.
        """
        at, members = self.constants, self.group.members
        outside = max(members - len(node) for node in self.group.nodes)
        crossing = received * outside / max(members - 1, 1)
        return max((received - crossing) * at.byte_s, crossing * at.cross_byte_s)


class StepTotals:
    """A workload's totals with a cost model, and the quantities that several formulas use, each computed once."""

    def __init__(self, model: CostModel, totals: WorkloadTotals) -> None:
        self.model, self.totals = model, totals

    def cheapest(self, among: Sequence[Priced] = ()) -> Priced:
        """The schedule that takes the fewest seconds; without `among` of all under which something travels."""
        return min(among or self.model.moving, key=lambda schedule: schedule.seconds(self).seconds)

    @cached_property
    def queries(self) -> tuple[float, float, float]:
        """When queries travel, bytes on the busiest member: (queries received, states received, states handled).

        Handled are the states that it packs for others and those that it merges for its own rows.
        """
        shape, members, rows = self.model.shape, self.model.group.members, self.totals.rows
        each, most = self.model.group.members_per_pcp, max(rows)
        arriving = (sum(rows) * each - min(rows)) * shape.query_bytes
        returning = (members - 1) * most * shape.state_bytes
        handled = sum(rows) * each * shape.state_bytes + members * most * shape.state_bytes
        return arriving, returning, handled

    @cached_property
    def query_compute(self) -> float:
        """Seconds of attention on the busiest rank when queries travel, with all heads of a DCP group on each shard."""
        heads = self.model.shape.q_heads * self.model.group.members_per_pcp
        return self.model.compute(self.totals.by_shard, heads, visitors=True)

    @cached_property
    def query_calls(self) -> int:
        """Kernel calls on the busiest shard, when queries travel, beyond one for each pcp index with rows."""
        return max(load.calls for load in self.totals.by_shard) - sum(rows != 0 for rows in self.totals.rows)

    @cached_property
    def key_compute(self) -> float:
        """Seconds of attention on the busiest rank when keys travel."""
        return self.model.compute(self.totals.by_pcp, self.model.shape.q_heads, self.model.group.members_per_pcp)

    @cached_property
    def key_calls(self) -> int:
        """Kernel calls on the busiest rank, when keys travel, beyond one for each shard."""
        return max(load.calls for load in self.totals.by_pcp) - self.model.group.members

    def queries_sent(self) -> int:
        """Bytes that the group sends when queries travel: each row's query to every other member, which returns one
        attention state. `ring_q` and `tree_q` send as many.
        """
        shape, group = self.model.shape, self.model.group
        each_way = shape.query_bytes + shape.state_bytes
        return (group.members - 1) * group.members_per_pcp * sum(self.totals.rows) * each_way

    @cached_property
    def members_with_rows(self) -> list[int]:
        """The members that compute travelling rows."""
        blocks = zip(self.model.group.shards_of_pcp, self.totals.rows, strict=True)
        return [shard for shards, rows in blocks if rows for shard in shards]

    def keys_sent(self) -> int:
        """Bytes that the group sends when keys travel: keys and values of each needed token to all other members.

        Under `gather_kv` they are sent only to members that have rows.
        """
        return (self.model.group.members - 1) * sum(self.totals.needed) * self.model.shape.kv_bytes

    def keys(self, block: int) -> tuple[float, float, int]:
        """When keys travel, in blocks of `block` tokens of each shard: (bytes received, bytes handled, rounds).

        Bytes are those of the busiest member. Handled are the keys that it packs and the states that it merges. The
        tokens of one segment are most often adjacent, and need not be packed where they are passed by reference.
        """
        shape, members, needed = self.model.shape, self.model.group.members, self.totals.needed
        rounds = max(1, -(-max(needed, default=0) // max(block, 1)))
        arriving = (sum(needed) - min(needed)) * shape.kv_bytes
        merged = rounds * members * 2 * max(self.totals.rows) * shape.state_bytes
        loads = zip(needed, self.totals.by_shard, strict=True)
        in_place = self.model.group.shares_memory
        own = max(0 if in_place and load.calls <= 1 else count for count, load in loads) * shape.kv_bytes
        return arriving, own + merged, rounds

    def fixed(self, schedule: str, messages: int, more_calls: int) -> float:
        """Seconds that do not depend on sizes, as measured for `schedule`, plus `more_calls` kernel calls.

        A schedule that was not measured takes the latency of `messages` collectives and one kernel call. Measurements
        exist for one pcp index with rows and for all of them; between both, time grows with their number.
        """
        at, rows = self.model.constants, self.totals.rows
        latency = at.message_s if len(self.model.group.nodes) == 1 else at.cross_message_s
        measured = at.fixed.get(schedule) or Fixed(messages * latency + at.call_s, messages * latency + at.call_s)
        share = (sum(count != 0 for count in rows) - 1) / max(len(rows) - 1, 1)
        return measured.one + share * (measured.all - measured.one) + max(more_calls, 0) * at.call_s

    def hidden(self, compute: float, circulating: float) -> float:
        """Seconds of a ring's transfers that overlap with computing.

        A ring of n members computes n blocks and makes n − 1 transfers, each during the computation of a block.
        """
        members = self.model.group.members
        return self.model.constants.hidden * min(compute * (members - 1) / members, circulating)


@dataclass(frozen=True)
class ScheduleChooser:
    """Chooses the schedule of a phase and layer group."""

    # estimates the schedules
    model: CostModel
    # name of the schedule that the user chose, or `auto`
    forced: str = "auto"
    # whether decode steps are recorded
    records_decode: bool = False
    # most rows of a pcp index in a step with prompt tokens that is recorded; 0 if none is
    short_rows: int = 0

    def __post_init__(self) -> None:
        require_choice("schedule", self.forced, ("auto", *self.model.schedules))

    @cached_property
    def _recordable(self) -> tuple[Priced, ...]:
        """The schedules among which one is chosen for steps that are recorded.

        A step under another schedule is not recorded, and its launches cost several times what any schedule can save.
        The constants cannot show this, because they are measured without recording. Where pools are mapped, calls of
        a CPU's kernels are recorded, between which nothing can be sent.
        """
        found = [schedule for schedule in self.model.moving if schedule.recordable]
        in_place = [schedule for schedule in found if schedule.moves == "signals"]
        return tuple(in_place or found)

    def choose(self, workload: PhaseWorkload, decode: bool = False, rows: int | None = None) -> str:
        """`local` if no row travels; else the schedule that the user chose, or the cheapest.

        `rows` are those of the step's fullest pcp index, None if the step is not to be a short one.
        """
        if not sum(workload.rows):
            return "local"
        if self.forced != "auto":
            return self.forced
        short = rows is not None and rows <= self.short_rows
        among = self._recordable if short or (decode and self.records_decode) else ()
        return StepTotals(self.model, workload.totals(self.model.group.members)).cheapest(among).name
