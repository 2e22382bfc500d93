"""Queries travel, and states are merged inside each machine before they leave it.

Tree Attention (Shyam et al. 2024) with two levels: what crosses machines is one copy of a row's queries and one
state for each machine, not for each member. It owns this choreography; who is on which machine the group says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.schedules.base import Join, Schedule, pack, unpack
from longspan.attention.state import AttentionState
from longspan.parallel.collectives import Collectives

_NAME = "tree_q"
_Nodes = Sequence[Sequence[int]]


def run(join: Join) -> AttentionState:
    """Attention states [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    group, nodes, rows = join.group.collectives, join.group.nodes, join.rows
    exchange = _Exchange(group, rows)
    home = next(node for node in nodes if group.rank in node)
    stands_for = {member: proxies(nodes, home, member) for member in home}
    mine = stands_for[group.rank]

    def merged(parts: Sequence[Tensor]) -> Tensor:
        return pack(join.variant.merge([unpack(part) for part in parts]))

    queries = exchange(
        {proxy(node, nodes, group.rank): [group.rank] for node in nodes},
        {member: [member] for member in mine},
        {group.rank: join.variant.outgoing(join.q)},
    )
    queries = exchange(dict.fromkeys(home, mine), stands_for, queries)
    states = dict(enumerate(join.visit([queries[member] for member in range(group.size)])))
    gathered = exchange({peer: stands_for[peer] for peer in home}, dict.fromkeys(home, mine), states, merged)
    reps = [proxy(node, nodes, group.rank) for node in nodes]
    home_again = exchange({m: [m] for m in mine}, {rep: [group.rank] for rep in reps}, gathered, merged)
    return join.merged([home_again[group.rank]])


def proxy(node: Sequence[int], nodes: _Nodes, member: int) -> int:
    """Who handles a member's rows inside `node`: itself at home, elsewhere the one in its place."""
    place = next(home.index(member) for home in nodes if member in home)
    return node[place % len(node)]


def proxies(nodes: _Nodes, node: Sequence[int], member: int) -> list[int]:
    """All members whose rows `member` handles inside its `node`, in member order."""
    everyone = sorted(other for home in nodes for other in home)
    return [other for other in everyone if proxy(node, nodes, other) == member]


class _Exchange:
    """One all-to-all of rows by the member they belong to; most pairs have nothing for each other."""

    def __init__(self, group: Collectives, rows: Sequence[int]) -> None:
        self._group = group
        self._rows = rows

    def __call__(
        self,
        sends: dict[int, list[int]],
        arrives: dict[int, list[int]],
        held: dict[int, Tensor],
        combine: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0],
    ) -> dict[int, Tensor]:
        """Send to each peer the rows of the members `sends` names, take in those `arrives` names, combine by member."""
        like = next(iter(held.values()))
        outgoing = [
            torch.cat([held[member] for member in sends[peer]]) if sends.get(peer) else like[:0]
            for peer in range(self._group.size)
        ]
        counts = [[self._rows[member] for member in arrives.get(peer, [])] for peer in range(self._group.size)]
        received = self._group.all_to_all(outgoing, [(sum(c), *like.shape[1:]) for c in counts], _NAME)
        found: dict[int, list[Tensor]] = {}
        for peer, whole in enumerate(received):
            for member, part in zip(arrives.get(peer, []), torch.split(whole, counts[peer]), strict=True):
                found.setdefault(member, []).append(part)
        return {member: combine(parts) for member, parts in found.items()}


def seconds(step: StepTotals) -> LayerTime:
    """Between machines one copy a machine; two exchanges each way."""
    model, rows = step.model, step.totals.rows
    shape, at, nodes = model.shape, model.constants, model.group.nodes
    widest, most, visiting = max(map(len, nodes)), max(rows), sum(rows) * model.group.members_per_pcp
    arriving = visiting * shape.query_bytes
    across = (len(nodes) - 1) / len(nodes)
    column = most * len(nodes) * shape.state_bytes
    inside = (arriving + (widest - 1) * column) * at.byte_s
    crossing = (arriving / widest * across + (len(nodes) - 1) * most * shape.state_bytes) * at.cross_byte_s
    return LayerTime(
        fixed=step.fixed(_NAME, 4, step.query_calls),
        compute=step.query_compute,
        transfer=inside + crossing,
        copies=(visiting * shape.state_bytes + (widest + 1) * column) * at.copy_s,
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="queries",
    run=run,
    bytes=StepTotals.queries_sent,
    seconds=seconds,
    colour="#7468b0",
    sentence="queries travel; answers are merged node by node",
)
