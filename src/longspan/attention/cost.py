"""What each schedule would take, in seconds and bytes, and which is the cheapest.

It owns the formulas and the choice; pure Python. It gets counts (`facts`) and constants, measured at start-up or of
a named machine, and must not know where they come from, nor which rank asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from longspan.attention.facts import (
    AttentionShape,
    ClassFacts,
    ClassTotals,
    ExpansionCost,
    GroupShape,
    Load,
    gather_kv_bytes,
    gather_q_bytes,
    gather_q_rs_bytes,
)
from longspan.config import CostConstants, Fixed


@dataclass(frozen=True)
class Estimate:
    """One schedule's cost for one layer: bytes the whole group sends, seconds and what they are made of.

    `seconds` = fixed + compute + transfer + copies − hidden: what of the transfer goes on beside computing.
    """

    schedule: str
    bytes: int
    fixed: float
    compute: float
    transfer: float
    copies: float
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.fixed + self.compute + self.transfer + self.copies - self.hidden


@dataclass(frozen=True)
class CostModel:
    """The formulas for one layer's shape, group and machine; `workspace_tokens` is what keys may fill at once."""

    shape: AttentionShape
    group: GroupShape
    constants: CostConstants = field(default_factory=CostConstants)
    workspace_tokens: int = 16384

    def estimates(self, facts: ClassFacts) -> list[Estimate]:
        """Every schedule that could carry out the step."""
        return self.estimates_of(_FORMULAS, facts.totals(self.group.members))

    def estimates_of(self, schedules: Iterable[str], totals: ClassTotals) -> list[Estimate]:
        """Several schedules; `local`: nothing travels."""
        step = _Step(self, totals)
        return [_FORMULAS.get(schedule, _local)(step) for schedule in schedules]

    def estimate(self, schedule: str, totals: ClassTotals) -> Estimate:
        """One of them."""
        return self.estimates_of((schedule,), totals)[0]

    def fixed(self, schedule: str, facts: ClassTotals, messages: int, more_calls: int) -> float:
        """Seconds that do not depend on sizes: latencies, and `more_calls` than one for each row and shard."""
        at = self.constants
        busy = sum(rows != 0 for rows in facts.rows)
        latency = at.message_s if len(self.group.nodes) == 1 else at.cross_message_s
        measured = at.fixed.get(schedule) or Fixed(messages * latency + at.call_s, messages * latency + at.call_s)
        share = (busy - 1) / max(len(facts.rows) - 1, 1)
        return measured.one + share * (measured.all - measured.one) + max(more_calls, 0) * at.call_s

    def compute(self, loads: Sequence[Load], heads: int, ranks_per_load: int = 1, visitors: bool = False) -> float:
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


class _Step:
    """A step's totals under a model, and what several formulas need of them, each worked out once."""

    def __init__(self, model: CostModel, facts: ClassTotals) -> None:
        self.model, self.facts = model, facts

    @cached_property
    def queries(self) -> tuple[float, float, float]:
        """(bytes of queries the busiest member takes in, of partials, of partials it packs and merges)."""
        shape, members, rows = self.model.shape, self.model.group.members, self.facts.rows
        each, most = self.model.group.members_per_pcp, max(rows)
        arriving = (sum(rows) * each - min(rows)) * shape.query_bytes
        returning = (members - 1) * most * shape.partial_bytes
        handled = sum(rows) * each * shape.partial_bytes + members * most * shape.partial_bytes
        return arriving, returning, handled

    @cached_property
    def query_compute(self) -> float:
        """Heads of a whole DCP group meet on a shard; expanding is not possible for visitors."""
        heads = self.model.shape.q_heads * self.model.group.members_per_pcp
        return self.model.compute(self.facts.by_shard, heads, visitors=True)

    @cached_property
    def query_calls(self) -> int:
        """Calls on the busiest shard beyond one for each pcp index with rows."""
        return max(load.calls for load in self.facts.by_shard) - sum(rows != 0 for rows in self.facts.rows)

    @cached_property
    def key_compute(self) -> float:
        """Of the busiest rank when keys come to it."""
        return self.model.compute(self.facts.by_pcp, self.model.shape.q_heads, self.model.group.members_per_pcp)

    @cached_property
    def key_calls(self) -> int:
        """Calls of the busiest rank beyond one for each shard."""
        return max(load.calls for load in self.facts.by_pcp) - self.model.group.members

    def keys(self, block: int) -> tuple[int, float, float, int]:
        """(bytes, those the busiest member takes in, bytes copied and merged, rounds) when keys travel in blocks."""
        shape, members, needed = self.model.shape, self.model.group.members, self.facts.needed
        rounds = max(1, -(-max(needed, default=0) // max(block, 1)))
        arriving = (sum(needed) - min(needed)) * shape.kv_bytes
        merged = rounds * members * 2 * max(self.facts.rows) * shape.partial_bytes
        own = max(needed) * shape.kv_bytes
        return gather_kv_bytes(shape, sum(needed), members), arriving, own + merged, rounds


def _local(step: _Step) -> Estimate:
    calls = max(max(load.calls for load in step.facts.by_pcp), 1)
    return Estimate("local", 0, calls * step.model.constants.call_s, step.key_compute, 0.0, 0.0)


def _gather_q(step: _Step) -> Estimate:
    model, facts = step.model, step.facts
    arriving, returning, handled = step.queries
    return Estimate(
        "gather_q",
        gather_q_bytes(model.shape, facts.rows, model.group.members_per_pcp),
        model.fixed("gather_q", facts, 2, step.query_calls),
        step.query_compute,
        model.exchange(arriving) + model.exchange(returning),
        handled * model.constants.copy_s,
    )


def _gather_q_rs(step: _Step) -> Estimate:
    model, facts = step.model, step.facts
    arriving, returning, handled = step.queries
    members, each = model.group.members, model.group.members_per_pcp
    lse = (members - 1) * sum(facts.rows) * each * model.shape.lse_bytes
    return Estimate(
        "gather_q_rs",
        gather_q_rs_bytes(model.shape, facts.rows, each),
        model.fixed("gather_q_rs", facts, 3, step.query_calls),
        step.query_compute,
        model.exchange(arriving) + model.exchange(lse) + model.exchange(returning),
        handled * model.constants.copy_s,
    )


def _tree_q(step: _Step) -> Estimate:
    """Between machines one copy a machine; two exchanges each way."""
    model, facts = step.model, step.facts
    shape, at, nodes = model.shape, model.constants, model.group.nodes
    each, rows = model.group.members_per_pcp, max(facts.rows)
    widest = max(map(len, nodes))
    arriving = sum(facts.rows) * each * shape.query_bytes
    across = (len(nodes) - 1) / len(nodes)
    column = rows * len(nodes) * shape.partial_bytes
    inside = (arriving + (widest - 1) * column) * at.byte_s
    crossing = (arriving / widest * across + (len(nodes) - 1) * rows * shape.partial_bytes) * at.cross_byte_s
    handled = sum(facts.rows) * each * shape.partial_bytes + (widest + 1) * column
    return Estimate(
        "tree_q",
        gather_q_bytes(shape, facts.rows, each),
        model.fixed("tree_q", facts, 4, step.query_calls),
        step.query_compute,
        inside + crossing,
        handled * at.copy_s,
    )


def _ring_q(step: _Step) -> Estimate:
    """Members of a DCP group come one by one, so a shard is read once for each."""
    model, facts = step.model, step.facts
    arriving, returning, handled = step.queries
    hops = model.group.members - 1
    again = model.group.members_per_pcp - 1
    reread = max(load.reads for load in facts.by_shard) * again * model.shape.kv_bytes * model.constants.read_s
    compute = step.query_compute + reread
    circulating = model.exchange(arriving)
    return Estimate(
        "ring_q",
        gather_q_bytes(model.shape, facts.rows, model.group.members_per_pcp),
        model.fixed("ring_q", facts, hops + 1, (again + 1) * step.query_calls),
        compute,
        circulating + model.exchange(returning),
        handled * model.constants.copy_s,
        _hidden(model, compute, circulating),
    )


def _hidden(model: CostModel, compute: float, circulating: float) -> float:
    """A ring of n computes n blocks and moves n − 1: each move goes on beside a block."""
    members = model.group.members
    return model.constants.hidden * min(compute * (members - 1) / members, circulating)


def _gather_kv(step: _Step) -> Estimate:
    model = step.model
    sent, arriving, handled, rounds = step.keys(model.workspace_tokens // model.group.members)
    copies = handled * model.constants.copy_s
    fixed = rounds * model.fixed("gather_kv", step.facts, 1, step.key_calls)
    return Estimate("gather_kv", sent, fixed, step.key_compute, model.exchange(arriving), copies)


def _ring_kv(step: _Step) -> Estimate:
    model = step.model
    sent, arriving, handled, rounds = step.keys(model.workspace_tokens // 2)
    fixed = rounds * model.fixed("ring_kv", step.facts, model.group.members - 1, step.key_calls)
    moving = model.exchange(arriving)
    copies = handled * model.constants.copy_s
    hidden = _hidden(model, step.key_compute, moving)
    return Estimate("ring_kv", sent, fixed, step.key_compute, moving, copies, hidden)


_FORMULAS: Mapping[str, Callable[[_Step], Estimate]] = MappingProxyType(
    {
        "gather_q": _gather_q,
        "gather_q_rs": _gather_q_rs,
        "ring_q": _ring_q,
        "tree_q": _tree_q,
        "gather_kv": _gather_kv,
        "ring_kv": _ring_kv,
    }
)


@dataclass(frozen=True)
class ScheduleChooser:
    """Chooses a schedule by class: what the user forced, or the fewest seconds."""

    model: CostModel
    forced: str = "auto"

    def choose(self, facts: ClassFacts) -> str:
        """`local` if nothing travels; else the forced schedule, or the cheapest."""
        if not sum(facts.rows):
            return "local"
        if self.forced != "auto":
            return self.forced
        return min(self.model.estimates(facts), key=lambda estimate: estimate.seconds).schedule
