"""Attention variants: how a model's heads use the cache, as grouped-query or as multi-head latent attention.

It owns the choice between the absorbed and the expanded form of latent attention, and the bounded workspace of the
latter. It must not know about ranks: a schedule decides what travels, and asks the variant for the tensors to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.backends.base import Backend, PreparedRuns
from longspan.attention.layer import AttentionLayer, Latent
from longspan.attention.prepared import DiagonalRows, ExpandedBlock, OwnRuns
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.workload import ExpansionCost
from longspan.parallel.heads import HeadBlock
from longspan.parallel.sharding import Sharding


@dataclass(frozen=True)
class Heads:
    """Which of the KV heads that this rank stores are read by which query heads."""

    # by this rank's own query heads
    own: tuple[HeadBlock, ...]
    # by all query heads of its DCP group, in dcp order
    shard: tuple[HeadBlock, ...]
    # by the query heads of each member of its context group, in shard order
    by_member: tuple[tuple[HeadBlock, ...], ...]

    @staticmethod
    def of(sharding: Sharding) -> Heads:
        """The head blocks of the rank that `sharding` describes."""
        return Heads(sharding.own_blocks, sharding.shard_blocks, sharding.member_blocks)


@dataclass(frozen=True)
class AttentionOps:
    """The backend of one rank, with the sizes that all its calls need."""

    # computes attention on this rank
    backend: Backend
    # which query heads read which KV heads
    heads: Heads
    # factor on scores
    scale: float
    # elements of a result over cached rows: those of a value, or of a latent
    value_dim: int
    # when latents are expanded
    expansion: ExpansionCost

    def variant(self, layer: AttentionLayer) -> AttentionVariant:
        """The attention variant of a layer."""
        return GroupedQueryVariant(self) if layer.latent is None else MultiHeadLatentVariant(self, layer.latent)


class AttentionVariant(Protocol):
    """Attention of one layer on one rank.

    Queries of this rank's own heads are [T, Hq, Dq], as the model passes them. A schedule sends queries and states in
    another form if the variant needs it: it passes queries through `sent_queries` before it sends them, and the merged
    state that it receives through `received_state`.
    """

    # elements of a value, so of a result
    value_dim: int
    # elements of a result while it is sent
    sent_dim: int

    def diagonal(
        self, q: Tensor, k: Tensor, v: Tensor, rows: DiagonalRows, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """Causal attention of segments to themselves: q [T, Hq, Dq], k and v [T, Hkv, D] as they are cached.

        Returns out [T, Hq, value_dim]. `dtype` is that of `PreparedRuns.attend`.
        """
        ...

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows, dtype: torch.dtype | None = None) -> AttentionState:
        """Attention of this rank's queries [T, Hq, Dq] to cached rows, of its own pool or received from other ranks.

        Returns out [T, Hq, value_dim]. `dtype` is that of `PreparedRuns.attend`.
        """
        ...

    def sent_queries(self, q: Tensor) -> Tensor:
        """This rank's queries [T, Hq, Dq] in the form in which they are sent: [T, Hq, D]."""
        ...

    def attend_received(
        self, q: Tensor, runs: PreparedRuns, kv: CacheRows, member: int | None = None
    ) -> AttentionState:
        """Attention of received queries [T, Hq, D] to this rank's cached rows: out [T, Hq, sent_dim].

        The heads are those of one member of the context group, or of this rank's whole DCP group if `member` is None.
        """
        ...

    def received_state(self, part: AttentionState) -> AttentionState:
        """A received state, out [T, Hq, sent_dim], in the form of values: out [T, Hq, value_dim]."""
        ...

    def merge(self, parts: Sequence[AttentionState], dtype: torch.dtype | None = None) -> AttentionState:
        """See `Backend.merge`."""
        ...


class _VariantBase:
    """What both variants share: received queries attend to cached rows as they are."""

    def __init__(self, ops: AttentionOps) -> None:
        self._ops = ops

    def attend_received(
        self, q: Tensor, runs: PreparedRuns, kv: CacheRows, member: int | None = None
    ) -> AttentionState:
        """See `AttentionVariant.attend_received`."""
        heads = self._ops.heads
        return self._attend(q, runs, kv, heads.shard if member is None else heads.by_member[member])

    def merge(self, parts: Sequence[AttentionState], dtype: torch.dtype | None = None) -> AttentionState:
        """See `AttentionVariant.merge`."""
        return self._ops.backend.merge(parts, dtype)

    def _attend(
        self,
        q: Tensor,
        runs: PreparedRuns,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """q [T, Hq, D] against cached rows: out [T, Hq, `AttentionOps.value_dim`]."""
        return runs.attend(q, kv, blocks, self._ops.scale, dtype).columns(self._ops.value_dim)


class GroupedQueryVariant(_VariantBase):
    """Grouped-query attention, of which multi-head and multi-query attention are special cases: k and v are cached."""

    def __init__(self, ops: AttentionOps) -> None:
        super().__init__(ops)
        self.value_dim = self.sent_dim = ops.value_dim

    def diagonal(
        self, q: Tensor, k: Tensor, v: Tensor, rows: DiagonalRows, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """See `AttentionVariant.diagonal`."""
        return rows.prepared.attend(q, k, v, self._ops.heads.own, self._ops.scale, dtype)

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows, dtype: torch.dtype | None = None) -> AttentionState:
        """See `AttentionVariant.own`."""
        if runs.direct is None:
            raise TypeError("keys and values are never expanded")
        return self._attend(q, runs.direct, kv, self._ops.heads.own, dtype)

    def sent_queries(self, q: Tensor) -> Tensor:
        """See `AttentionVariant.sent_queries`."""
        return q

    def received_state(self, part: AttentionState) -> AttentionState:
        """See `AttentionVariant.received_state`."""
        return part


class MultiHeadLatentVariant(_VariantBase):
    """Multi-head latent attention (MLA): the cache holds latents.

    If few queries see a cached row, the queries are absorbed, that is, mapped into latent space. If many do, the row is
    expanded to keys and values instead. Queries that are sent to other ranks are always absorbed, because only this
    rank holds the weights that expand rows for its heads.

    Results in latent space are mapped to values before they are merged with results that are values already. This is
    exact, because the map is linear.
    """

    def __init__(self, ops: AttentionOps, latent: Latent) -> None:
        super().__init__(ops)
        self._latent = latent
        self.value_dim, self.sent_dim = latent.value_dim, ops.value_dim

    def diagonal(
        self, q: Tensor, k: Tensor, v: Tensor, rows: DiagonalRows, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """See `AttentionVariant.diagonal`."""
        ops = self._ops
        if rows.expanded:
            keys, values = self._latent.expand(k[:, 0]).transpose(1, 2)
            return rows.prepared.attend(q, keys, values[..., : self.value_dim], _each_head(q), ops.scale, dtype)
        part = rows.prepared.attend(self._latent.absorb(q), k, None, ops.heads.own, ops.scale, dtype)
        return self.received_state(part.columns(ops.value_dim))

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows, dtype: torch.dtype | None = None) -> AttentionState:
        """See `AttentionVariant.own`."""
        parts = [self._expanded(q, blocks, kv) for blocks in runs.expanded]
        if runs.direct is not None:
            alone = None if parts else dtype
            absorbed = self._attend(self._latent.absorb(q), runs.direct, kv, self._ops.heads.own, alone)
            parts.append(self.received_state(absorbed))
        return self.merge(parts, dtype)

    def sent_queries(self, q: Tensor) -> Tensor:
        """See `AttentionVariant.sent_queries`."""
        return self._latent.absorb(q)

    def received_state(self, part: AttentionState) -> AttentionState:
        """See `AttentionVariant.received_state`."""
        return AttentionState(self._latent.values(part.out), part.lse)

    def _expanded(self, q: Tensor, blocks: Sequence[ExpandedBlock], kv: CacheRows) -> AttentionState:
        """Attention of q [T, Hq, Dq] to rows that are expanded block by block, to bound the memory that this takes."""
        parts: list[AttentionState] = []
        for block in blocks:
            expanded = CacheRows(self._latent.expand(kv.take(block.spans).read(q.dtype)[0, 0]))
            part = block.runs.attend(q, expanded, _each_head(q), self._ops.scale)
            parts = [self.merge([*parts, part.columns(self.value_dim)])]
        return parts[0]


def _each_head(q: Tensor) -> tuple[HeadBlock, ...]:
    """Head blocks in which every query head of q [T, Hq, D] reads a KV head of its own."""
    return (HeadBlock(0, q.shape[1], 0, q.shape[1]),)
