"""The off-diagonal as a join of queries and pages (idea 5): what a schedule is, and what it is given.

It owns the record and its inputs; a schedule is one record in one file of this package.
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
    """The context group as attention sees it.

    `nodes` are its members by the machine they are on; `workspace_tokens` bounds what a schedule may gather at once.
    """

    collectives: Collectives
    shards_of_pcp: tuple[tuple[int, ...], ...]
    nodes: tuple[tuple[int, ...], ...]
    workspace_tokens: int


@dataclass(frozen=True)
class Join:
    """One layer's travelling queries of one phase on one rank, and the pages stored here.

    q [T, Hq, D] are this rank's travelling rows, kv its pool.
    """

    q: Tensor
    kv: CacheRows
    prepared: PreparedReach
    variant: AttentionVariant
    group: ContextGroup

    @property
    def reach(self) -> Reach:
        """What the rows see, in plain integers."""
        return self.prepared.reach

    @property
    def rows(self) -> list[int]:
        """Travelling rows of every member."""
        blocks = zip(self.group.shards_of_pcp, self.reach.block_rows, strict=True)
        rows_of = {shard: rows for shards, rows in blocks for shard in shards}
        return [rows_of[shard] for shard in sorted(rows_of)]

    @property
    def packed_dim(self) -> int:
        """Width of a state on its way: out and lse."""
        return self.variant.travelling_dim + 1

    def nothing(self) -> list[Tensor]:
        """Packed states of no rows for every member."""
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        return [self.q.new_empty(0, self.q.shape[1], self.packed_dim, dtype=dtype)] * self.group.collectives.size

    def visit(self, queries: Sequence[Tensor]) -> list[Tensor]:
        """Every member's queries [T, Hq, D] against the pages stored here: packed states [T, Hq, out | lse]."""
        heads, found = self.q.shape[1], self.nothing()
        blocks = zip(self.group.shards_of_pcp, self.reach.block_rows, self.prepared.visiting, strict=True)
        for shards, rows, runs in blocks:
            # the members of a TP group hold the same tokens and different heads: attend them together
            if not rows:
                continue
            held = [queries[shard] for shard in shards]
            together = held[0] if len(held) == 1 else torch.cat(held, dim=1)
            packed = pack(self.variant.visiting(together, runs, self.kv))
            for shard, piece in zip(shards, torch.split(packed, heads, dim=1), strict=True):
                found[shard] = piece
        return found

    def merged(self, packed: Sequence[Tensor]) -> AttentionState:
        """This rank's rows, from states over all that they see."""
        if not len(self.q):
            return AttentionState.empty(0, self.q.shape[1], self.variant.value_dim, self.q)
        return self.variant.incoming(self.variant.merge([unpack(part) for part in packed]))


def pack(part: AttentionState) -> Tensor:
    """[T, H, out | lse], so that a state travels as one tensor."""
    return torch.cat([part.out, part.lse[..., None]], dim=-1)


def unpack(packed: Tensor) -> AttentionState:
    """The inverse of `pack`."""
    return AttentionState(packed[..., :-1], packed[..., -1])


@dataclass(frozen=True)
class Schedule:
    """One way to bring queries and pages together: what it does, what it costs, and how people see it."""

    # as plans, options and figures have it; its collectives are counted under it
    name: str
    # what travels; None: nothing does
    moves: Moves | None
    # states [T, Hq, D] of this rank's travelling rows over all pages of the context group
    run: Callable[[Join], AttentionState]
    # that all members of a context group send for one layer
    bytes: Callable[[StepTotals], int]
    # that one layer takes
    seconds: Callable[[StepTotals], LayerTime]
    # whether what it sends has the same shapes for all steps of as many rows, so that a step can be recorded
    recordable: bool = field(default=False, kw_only=True)
    # of its bars and boxes, as #rrggbb; white text must be readable on it
    colour: str
    # what the ranks send each other, in plain words
    sentence: str
