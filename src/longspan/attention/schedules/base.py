"""What a schedule is, and what it is given: off the diagonal, attention is a distributed join of queries and pages.

It owns the record of a schedule and its inputs (idea 5 of docs/architecture.md). Each schedule is one record in one
file of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.prepared import PreparedReach
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.variants import AttentionVariant
from longspan.parallel.collectives import Collectives
from longspan.plan.reach import Moves, Reach


@dataclass(frozen=True)
class ContextGroup:
    """The context group of one rank, as attention knows it."""

    # this rank's handle on the group; its members are the shards
    collectives: Collectives
    # for every pcp index, the shards that its ranks store
    shards_of_pcp: tuple[tuple[int, ...], ...]
    # the members on each machine
    nodes: tuple[tuple[int, ...], ...]
    # most tokens whose keys a schedule may gather at once
    workspace_tokens: int


@dataclass(frozen=True)
class Join:
    """The input of a schedule: the travelling rows of one phase in one layer on one rank, and the rank's pages."""

    # [T, Hq, Dq]: queries of this rank's travelling rows, as the model passes them
    q: Tensor
    # cached rows of the layer in this rank's pool; with those of its peers if they are read in place
    kv: CacheRows
    # what the rows attend to
    prepared: PreparedReach
    # how heads use the cache
    variant: AttentionVariant
    # the ranks that take part
    group: ContextGroup
    # if nothing will be merged with the result, the dtype in which out is wanted: see `PreparedRuns.attend`
    dtype: torch.dtype | None = None

    @property
    def reach(self) -> Reach:
        """What the rows attend to, in plain integers."""
        return self.prepared.reach

    @property
    def rows(self) -> list[int]:
        """Number of travelling rows of each member, in shard order."""
        blocks = zip(self.group.shards_of_pcp, self.reach.block_rows, strict=True)
        rows_of = {shard: rows for shards, rows in blocks for shard in shards}
        return [rows_of[shard] for shard in sorted(rows_of)]

    @property
    def packed_dim(self) -> int:
        """Width of a packed state: out and lse."""
        return self.variant.sent_dim + 1

    def nothing(self) -> list[Tensor]:
        """For each member a packed state without rows: [0, Hq, out | lse]."""
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        return [self.q.new_empty(0, self.q.shape[1], self.packed_dim, dtype=dtype)] * self.group.collectives.size

    def attend_received(self, queries: Sequence[Tensor]) -> list[Tensor]:
        """Attention of all members' queries to this rank's pages.

        `queries` are [T, Hq, D] of each member in shard order, as they are sent. Returns packed states [T, Hq, out |
        lse] in the same order.
        """
        heads, found = self.q.shape[1], self.nothing()
        blocks = zip(self.group.shards_of_pcp, self.reach.block_rows, self.prepared.received, strict=True)
        for shards, rows, runs in blocks:
            # members of one pcp index have the same tokens and different heads: their queries share one kernel call
            if not rows:
                continue
            held = [queries[shard] for shard in shards]
            together = held[0] if len(held) == 1 else torch.cat(held, dim=1)
            packed = pack(self.variant.attend_received(together, runs, self.kv))
            for shard, piece in zip(shards, torch.split(packed, heads, dim=1), strict=True):
                found[shard] = piece
        return found

    def merged(self, packed: Sequence[Tensor]) -> AttentionState:
        """The state of this rank's rows, out [T, Hq, value_dim], from packed states that together cover all keys."""
        if not len(self.q):
            return AttentionState.empty(0, self.q.shape[1], self.variant.value_dim, self.q)
        return self.variant.received_state(self.variant.merge([unpack(part) for part in packed], self.dtype))


def pack(part: AttentionState) -> Tensor:
    """A state as one tensor [T, H, out | lse], so that it is sent with one transfer."""
    return torch.cat([part.out, part.lse[..., None]], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """The inverse of `pack`."""
    return AttentionState(packed[..., :-1], packed[..., -1])


@dataclass(frozen=True)
class Schedule:
    """One way to bring queries and pages of different ranks together."""

    # name in plans, options and figures; also the label under which its bytes are counted
    name: str
    # what travels; None if nothing does
    moves: Moves | None
    # the attention state, out [T, Hq, Dv], of this rank's travelling rows over all pages of the context group
    run: Callable[[Join], AttentionState]
    # bytes that all members of the context group send for one layer
    bytes: Callable[[StepTotals], int]
    # time of one layer
    seconds: Callable[[StepTotals], LayerTime]
    # whether the shapes that it sends depend on the number of rows only, so that a recorded decode step can contain it
    recordable: bool = field(default=False, kw_only=True)
    # colour of its bars and boxes in figures, as #rrggbb; white text must be readable on it
    colour: str
    # what ranks send to each other, as a sentence for users
    sentence: str
