"""In which form queries meet keys: as they are, or for latents absorbed or expanded.

It owns the choice between the forms and their bounded work space; it must not know about ranks: what travels
is a schedule's business, and a schedule asks here what to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longspan.attention.backends.base import Backend, PreparedDiagonal, PreparedRuns
from longspan.attention.layer import AttentionLayer, Latent
from longspan.attention.prepared import ExpandedBlock, OwnRuns
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.workload import ExpansionCost
from longspan.parallel.heads import HeadBlock
from longspan.parallel.sharding import Sharding


@dataclass(frozen=True)
class Heads:
    """Groupings of one rank's heads.

    `own` maps this rank's query heads, `shard` all query heads of its DCP group (in dcp order), `by_member` those of
    each member of its context group, to the KV heads stored here.
    """

    own: tuple[HeadBlock, ...]
    shard: tuple[HeadBlock, ...]
    by_member: tuple[tuple[HeadBlock, ...], ...]

    @staticmethod
    def of(sharding: Sharding) -> Heads:
        """Of the rank whose share of the heads this is."""
        return Heads(sharding.own_blocks, sharding.shard_blocks, sharding.member_blocks)


@dataclass(frozen=True)
class AttentionOps:
    """The backend with what it needs on one rank; `value_dim` is the width of a result over cache rows."""

    backend: Backend
    heads: Heads
    scale: float
    value_dim: int
    expansion: ExpansionCost

    def variant(self, layer: AttentionLayer) -> AttentionVariant:
        """The form of a layer's attention."""
        return GroupedQueryVariant(self) if layer.latent is None else MultiHeadLatentVariant(self, layer.latent)


class AttentionVariant(Protocol):
    """Queries of this rank's own heads are a model's, [T, Hq, Dq]; results are values [T, Hq, value_dim]."""

    value_dim: int
    travelling_dim: int

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor, diagonal: PreparedDiagonal) -> AttentionState:
        """One segment against itself: k and v as they are cached, [T, Hkv, D]."""
        ...

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows) -> AttentionState:
        """Own queries against cache rows, this rank's or brought here."""
        ...

    def outgoing(self, q: Tensor) -> Tensor:
        """Own queries as they travel."""
        ...

    def visiting(self, q: Tensor, runs: PreparedRuns, kv: CacheRows, member: int | None = None) -> AttentionState:
        """Queries that came here, of one member of the context group or of a whole DCP group at once, `travelling_dim`
        wide results for the way back."""
        ...

    def incoming(self, part: AttentionState) -> AttentionState:
        """Results that came back."""
        ...

    def merge(self, parts: Sequence[AttentionState]) -> AttentionState:
        """See `Backend.merge`."""
        ...


class _Base:
    """What both forms have in common: queries that came here meet rows as they are cached."""

    def __init__(self, ops: AttentionOps) -> None:
        self._kernels = ops

    def visiting(self, q: Tensor, runs: PreparedRuns, kv: CacheRows, member: int | None = None) -> AttentionState:
        """See `AttentionVariant.visiting`."""
        heads = self._kernels.heads
        return self._attend(q, runs, kv, heads.shard if member is None else heads.by_member[member])

    def merge(self, parts: Sequence[AttentionState]) -> AttentionState:
        """See `AttentionVariant.merge`."""
        return self._kernels.backend.merge(parts)

    def _attend(self, q: Tensor, runs: PreparedRuns, kv: CacheRows, blocks: Sequence[HeadBlock]) -> AttentionState:
        return runs.attend(q, kv, blocks, self._kernels.scale).columns(self._kernels.value_dim)


class GroupedQueryVariant(_Base):
    """Keys and values are cached as they are."""

    def __init__(self, ops: AttentionOps) -> None:
        super().__init__(ops)
        self.value_dim = self.travelling_dim = ops.value_dim

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor, diagonal: PreparedDiagonal) -> AttentionState:
        """See `AttentionVariant.diagonal`."""
        return diagonal.attend(q, k, v, self._kernels.heads.own, self._kernels.scale)

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows) -> AttentionState:
        """See `AttentionVariant.own`."""
        if runs.direct is None:
            raise TypeError("keys and values are never expanded")
        return self._attend(q, runs.direct, kv, self._kernels.heads.own)

    def outgoing(self, q: Tensor) -> Tensor:
        """See `AttentionVariant.outgoing`."""
        return q

    def incoming(self, part: AttentionState) -> AttentionState:
        """See `AttentionVariant.incoming`."""
        return part


class MultiHeadLatentVariant(_Base):
    """Latents are cached: few queries are absorbed into their space, for many the rows are expanded.

    Results in latent space are mapped to values before they are merged, which is exact since the map is linear.
    Queries that travel are absorbed: the rank they visit has other heads' maps.
    """

    def __init__(self, ops: AttentionOps, latent: Latent) -> None:
        super().__init__(ops)
        self._latent = latent
        self.value_dim, self.travelling_dim = latent.value_dim, ops.value_dim

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor, diagonal: PreparedDiagonal) -> AttentionState:
        """See `AttentionVariant.diagonal`."""
        ops, length = self._kernels, q.shape[0]
        if ops.expansion.pays(pairs=length * length / 2, tokens=length):
            keys, values = self._latent.expand(k[:, 0]).transpose(1, 2)
            return diagonal.attend(q, keys, values[..., : self.value_dim], _each_head(q), ops.scale)
        part = diagonal.attend(self._latent.absorb(q), k, None, ops.heads.own, ops.scale)
        return self.incoming(part.columns(ops.value_dim))

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows) -> AttentionState:
        """See `AttentionVariant.own`."""
        parts = [self._expanded(q, blocks, kv) for blocks in runs.expanded]
        if runs.direct is not None:
            absorbed = self._attend(self._latent.absorb(q), runs.direct, kv, self._kernels.heads.own)
            parts.append(self.incoming(absorbed))
        return self.merge(parts)

    def outgoing(self, q: Tensor) -> Tensor:
        """See `AttentionVariant.outgoing`."""
        return self._latent.absorb(q)

    def incoming(self, part: AttentionState) -> AttentionState:
        """See `AttentionVariant.incoming`."""
        return AttentionState(self._latent.values(part.out), part.lse)

    def _expanded(self, q: Tensor, blocks: Sequence[ExpandedBlock], kv: CacheRows) -> AttentionState:
        """Block by block: an expanded row is many times as wide as a latent."""
        parts: list[AttentionState] = []
        for block in blocks:
            expanded = CacheRows(self._latent.expand(kv.take(block.spans).read(q.dtype)[0, 0]))
            part = block.runs.attend(q, expanded, _each_head(q), self._kernels.scale)
            parts = [self.merge([*parts, part.columns(self.value_dim)])]
        return parts[0]


def _each_head(q: Tensor) -> tuple[HeadBlock, ...]:
    """Every query head on a KV head of its own."""
    return (HeadBlock(0, q.shape[1], 0, q.shape[1]),)
