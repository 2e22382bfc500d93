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
from longspan.attention.facts import ExpansionCost
from longspan.attention.layer import AttentionLayer, Latent
from longspan.attention.partial import Partial
from longspan.attention.prepared import ExpandedBlock, OwnRuns
from longspan.attention.rows import CacheRows
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
class Kernels:
    """The backend with what it needs on one rank; `value_dim` is the width of a result over cache rows."""

    backend: Backend
    heads: Heads
    scale: float
    value_dim: int
    expansion: ExpansionCost

    def form(self, layer: AttentionLayer) -> Form:
        """The form of a layer's attention."""
        return PlainForm(self) if layer.latent is None else LatentForm(self, layer.latent)


class Form(Protocol):
    """Queries of this rank's own heads are a model's, [T, Hq, Dq]; results are values [T, Hq, value_dim]."""

    value_dim: int
    travelling_dim: int

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor, diagonal: PreparedDiagonal) -> Partial:
        """One segment against itself: k and v as they are cached, [T, Hkv, D]."""
        ...

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows) -> Partial:
        """Own queries against cache rows, this rank's or brought here."""
        ...

    def outgoing(self, q: Tensor) -> Tensor:
        """Own queries as they travel."""
        ...

    def visiting(self, q: Tensor, runs: PreparedRuns, kv: CacheRows, member: int | None = None) -> Partial:
        """Queries that came here, of one member of the context group or of a whole DCP group at once, `travelling_dim`
        wide results for the way back."""
        ...

    def incoming(self, part: Partial) -> Partial:
        """Results that came back."""
        ...

    def merge(self, parts: Sequence[Partial]) -> Partial:
        """See `Backend.merge`."""
        ...


class _Base:
    """What both forms have in common: queries that came here meet rows as they are cached."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def visiting(self, q: Tensor, runs: PreparedRuns, kv: CacheRows, member: int | None = None) -> Partial:
        """See `Form.visiting`."""
        heads = self._kernels.heads
        return self._attend(q, runs, kv, heads.shard if member is None else heads.by_member[member])

    def merge(self, parts: Sequence[Partial]) -> Partial:
        """See `Form.merge`."""
        return self._kernels.backend.merge(parts)

    def _attend(self, q: Tensor, runs: PreparedRuns, kv: CacheRows, blocks: Sequence[HeadBlock]) -> Partial:
        return runs.attend(q, kv, blocks, self._kernels.scale).columns(self._kernels.value_dim)


class PlainForm(_Base):
    """Keys and values are cached as they are."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.value_dim = self.travelling_dim = kernels.value_dim

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor, diagonal: PreparedDiagonal) -> Partial:
        """See `Form.diagonal`."""
        return diagonal.attend(q, k, v, self._kernels.heads.own, self._kernels.scale)

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows) -> Partial:
        """See `Form.own`."""
        if runs.direct is None:
            raise TypeError("keys and values are never expanded")
        return self._attend(q, runs.direct, kv, self._kernels.heads.own)

    def outgoing(self, q: Tensor) -> Tensor:
        """See `Form.outgoing`."""
        return q

    def incoming(self, part: Partial) -> Partial:
        """See `Form.incoming`."""
        return part


class LatentForm(_Base):
    """Latents are cached: few queries are absorbed into their space, for many the rows are expanded.

    Results in latent space are mapped to values before they are merged, which is exact since the map is linear.
    Queries that travel are absorbed: the rank they visit has other heads' maps.
    """

    def __init__(self, kernels: Kernels, latent: Latent) -> None:
        super().__init__(kernels)
        self._latent = latent
        self.value_dim, self.travelling_dim = latent.value_dim, kernels.value_dim

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor, diagonal: PreparedDiagonal) -> Partial:
        """See `Form.diagonal`."""
        kernels, length = self._kernels, q.shape[0]
        if kernels.expansion.pays(pairs=length * length / 2, tokens=length):
            keys, values = self._latent.expand(k[:, 0]).transpose(1, 2)
            return diagonal.attend(q, keys, values[..., : self.value_dim], _each_head(q), kernels.scale)
        part = diagonal.attend(self._latent.absorb(q), k, None, kernels.heads.own, kernels.scale)
        return self.incoming(part.columns(kernels.value_dim))

    def own(self, q: Tensor, runs: OwnRuns, kv: CacheRows) -> Partial:
        """See `Form.own`."""
        parts = [self._expanded(q, blocks, kv) for blocks in runs.expanded]
        if runs.direct is not None:
            absorbed = self._attend(self._latent.absorb(q), runs.direct, kv, self._kernels.heads.own)
            parts.append(self.incoming(absorbed))
        return self.merge(parts)

    def outgoing(self, q: Tensor) -> Tensor:
        """See `Form.outgoing`."""
        return self._latent.absorb(q)

    def incoming(self, part: Partial) -> Partial:
        """See `Form.incoming`."""
        return Partial(self._latent.values(part.out), part.lse)

    def _expanded(self, q: Tensor, blocks: Sequence[ExpandedBlock], kv: CacheRows) -> Partial:
        """Block by block: an expanded row is many times as wide as a latent."""
        parts: list[Partial] = []
        for block in blocks:
            expanded = CacheRows(self._latent.expand(kv.take(block.spans).read(q.dtype)[0, 0]))
            part = block.runs.attend(q, expanded, _each_head(q), self._kernels.scale)
            parts = [self.merge([*parts, part.columns(self.value_dim)])]
        return parts[0]


def _each_head(q: Tensor) -> tuple[HeadBlock, ...]:
    """Every query head on a KV head of its own."""
    return (HeadBlock(0, q.shape[1], 0, q.shape[1]),)
