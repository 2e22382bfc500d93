"""Queries travel, and states are merged inside each machine before they are sent to another.

This is Tree Attention (Shyam et al. 2024) with two levels. Between machines one copy of a row's queries and one state
are sent for each machine, not for each member. Inside a machine one member is the *proxy* of each member elsewhere: it
receives that member's queries, passes them on, and merges the states for it. It owns the order of these operations.
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
    """See `Schedule.run`."""
    group, nodes, rows = join.group.collectives, join.group.nodes, join.rows
    exchange = _Exchange(group, rows)
    local = next(node for node in nodes if group.rank in node)  # members on this machine
    handled_by = {member: proxies(nodes, local, member) for member in local}  # whose rows each of them handles
    mine = handled_by[group.rank]

    def merged(parts: Sequence[Tensor]) -> Tensor:
        return pack(join.variant.merge([unpack(part) for part in parts]))

    # queries to one proxy on each machine, then to all members there
    queries = exchange(
        {proxy(node, nodes, group.rank): [group.rank] for node in nodes},
        {member: [member] for member in mine},
        {group.rank: join.variant.sent_queries(join.q)},
    )
    queries = exchange(dict.fromkeys(local, mine), handled_by, queries)
    states = dict(enumerate(join.attend_received([queries[member] for member in range(group.size)])))
    # states to the proxy, which merges them, then from each machine's proxy to the member that the rows belong to
    gathered = exchange({peer: handled_by[peer] for peer in local}, dict.fromkeys(local, mine), states, merged)
    reps = [proxy(node, nodes, group.rank) for node in nodes]
    returned = exchange({m: [m] for m in mine}, {rep: [group.rank] for rep in reps}, gathered, merged)
    return join.merged([returned[group.rank]])


def proxy(node: Sequence[int], nodes: _Nodes, member: int) -> int:
    """The member of machine `node` that handles the rows of `member`: itself on its own machine."""
    place = next(members.index(member) for members in nodes if member in members)
    return node[place % len(node)]


def proxies(nodes: _Nodes, node: Sequence[int], member: int) -> list[int]:
    """All members whose rows `member` handles on its machine `node`, in order."""
    all_members = sorted(other for members in nodes for other in members)
    return [other for other in all_members if proxy(node, nodes, other) == member]


class _Exchange:
    """An all-to-all of tensors by the member whose rows they hold. Most pairs of members send nothing."""

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
        """Exchange tensors and combine those of one member's rows.

        Args:
            sends: for each peer, the members whose tensors are sent to it.
            arrives: for each peer, the members whose tensors it sends.
            held: by member, the tensor [T, H, D] of its rows.
            combine: makes one tensor of all that arrived for a member.

        Returns:
            The combined tensors by member.
        """
        like = next(iter(held.values()))
        to_send = [
            torch.cat([held[member] for member in sends[peer]]) if sends.get(peer) else like[:0]
            for peer in range(self._group.size)
        ]
        counts = [[self._rows[member] for member in arrives.get(peer, [])] for peer in range(self._group.size)]
        received = self._group.all_to_all(to_send, [(sum(c), *like.shape[1:]) for c in counts], _NAME)
        found: dict[int, list[Tensor]] = {}
        for peer, whole in enumerate(received):
            for member, part in zip(arrives.get(peer, []), torch.split(whole, counts[peer]), strict=True):
                found.setdefault(member, []).append(part)
        return {member: combine(parts) for member, parts in found.items()}


def seconds(step: StepTotals) -> LayerTime:
    """See `Schedule.seconds`: two exchanges for queries and two for states; one copy for each machine crosses."""
    model, rows = step.model, step.totals.rows
    shape, at, nodes = model.shape, model.constants, model.group.nodes
    widest, most, received_rows = max(map(len, nodes)), max(rows), sum(rows) * model.group.members_per_pcp
    arriving = received_rows * shape.query_bytes
    across = (len(nodes) - 1) / len(nodes)
    column = most * len(nodes) * shape.state_bytes
    inside = (arriving + (widest - 1) * column) * at.byte_s
    crossing = (arriving / widest * across + (len(nodes) - 1) * most * shape.state_bytes) * at.cross_byte_s
    return LayerTime(
        fixed=step.fixed(_NAME, 4, step.query_calls),
        compute=step.query_compute,
        transfer=inside + crossing,
        copies=(received_rows * shape.state_bytes + (widest + 1) * column) * at.copy_s,
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
