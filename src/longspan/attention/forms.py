"""In which form queries meet keys: as they are, or for latents absorbed or expanded.

It owns the choice between the forms and their bounded work space; it must not know about ranks: what travels
is a schedule's business, and a schedule asks here what to send.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longspan.attention.backends.base import Backend, StaticRuns
from longspan.attention.facts import ExpansionCost
from longspan.attention.layer import AttentionLayer, Latent
from longspan.attention.partial import Partial
from longspan.attention.rows import CacheRows
from longspan.cache.pages import Span, clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.parallel.sharding import Sharding
from longspan.plan.reach import QueryRun

_EXPANDED_TOKENS = 1024  # cache rows held in expanded form at once


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
        if layer.latent is None:
            return PlainForm(self, layer.window)
        return LatentForm(self, layer.window, layer.latent)


class Form(Protocol):
    """Queries of this rank's own heads are a model's, [T, Hq, Dq]; results are values [T, Hq, value_dim]."""

    value_dim: int
    travelling_dim: int

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """One segment against itself: k and v as they are cached, [T, Hkv, D]."""
        ...

    def own(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """Own queries against cache rows, this rank's or brought here."""
        ...

    def outgoing(self, q: Tensor) -> Tensor:
        """Own queries as they travel."""
        ...

    def visiting(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """Queries of the whole DCP group that came here, `travelling_dim` wide results for the way back."""
        ...

    def visiting_member(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, member: int) -> Partial:
        """Queries of one member of the context group that came here, likewise."""
        ...

    def incoming(self, part: Partial) -> Partial:
        """Results that came back."""
        ...

    def merge(self, parts: Sequence[Partial]) -> Partial:
        """See `Backend.merge`."""
        ...


class PlainForm:
    """Keys and values are cached as they are."""

    def __init__(self, kernels: Kernels, window: int | None) -> None:
        self._kernels = kernels
        self._window = window
        self.value_dim = self.travelling_dim = kernels.value_dim

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """See `Form.diagonal`."""
        return self._kernels.backend.causal(q, k, v, self._kernels.heads.own, self._kernels.scale, self._window)

    def own(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """See `Form.own`."""
        return self._attend(q, runs, kv, self._kernels.heads.own)

    def outgoing(self, q: Tensor) -> Tensor:
        """See `Form.outgoing`."""
        return q

    def visiting(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """See `Form.visiting`."""
        return self._attend(q, runs, kv, self._kernels.heads.shard)

    def visiting_member(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, member: int) -> Partial:
        """See `Form.visiting_member`."""
        return self._attend(q, runs, kv, self._kernels.heads.by_member[member])

    def incoming(self, part: Partial) -> Partial:
        """See `Form.incoming`."""
        return part

    def merge(self, parts: Sequence[Partial]) -> Partial:
        """See `Form.merge`."""
        return self._kernels.backend.merge(parts)

    def _attend(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, blocks: Sequence[HeadBlock]) -> Partial:
        return self._kernels.backend.attend(q, runs, kv, blocks, self._kernels.scale).columns(self.value_dim)


class LatentForm:
    """Latents are cached: few queries are absorbed into their space, for many the rows are expanded.

    Results in latent space are mapped to values before they are merged, which is exact since the map is linear.
    Queries that travel are absorbed: the rank they visit has other heads' maps.
    """

    def __init__(self, kernels: Kernels, window: int | None, latent: Latent) -> None:
        self._kernels = kernels
        self._window = window
        self._latent = latent
        self.value_dim, self.travelling_dim = latent.value_dim, kernels.value_dim

    def diagonal(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """See `Form.diagonal`."""
        kernels, length = self._kernels, q.shape[0]
        if kernels.expansion.pays(pairs=length * length / 2, tokens=length):
            keys, values = self._latent.expand(k[:, 0]).transpose(1, 2)
            values = values[..., : self.value_dim]
            return kernels.backend.causal(q, keys, values, _each_head(q), kernels.scale, self._window)
        absorbed = self._latent.absorb(q)
        part = kernels.backend.causal(absorbed, k, None, kernels.heads.own, kernels.scale, self._window)
        return self.incoming(part.columns(kernels.value_dim))

    def own(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """See `Form.own`."""
        if isinstance(runs, StaticRuns):  # one token each: never worth expanding
            return self._absorbed(q, runs, kv)
        absorbed: list[QueryRun] = []
        parts: list[Partial] = []
        for sharers in _sharers(runs):
            pairs = sum(run.length * run.tokens for run in sharers)
            masked = any(run.lows for run in sharers)
            if not masked and self._kernels.expansion.pays(pairs, sharers[0].tokens):
                parts.append(self._expanded(q, sharers, kv))
            else:
                absorbed += sharers
        if absorbed or not parts:
            parts.append(self._absorbed(q, absorbed, kv))
        return self.merge(parts)

    def outgoing(self, q: Tensor) -> Tensor:
        """See `Form.outgoing`."""
        return self._latent.absorb(q)

    def visiting(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """See `Form.visiting`."""
        kernels = self._kernels
        return kernels.backend.attend(q, runs, kv, kernels.heads.shard, kernels.scale).columns(kernels.value_dim)

    def visiting_member(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, member: int) -> Partial:
        """See `Form.visiting_member`."""
        kernels = self._kernels
        part = kernels.backend.attend(q, runs, kv, kernels.heads.by_member[member], kernels.scale)
        return part.columns(kernels.value_dim)

    def incoming(self, part: Partial) -> Partial:
        """See `Form.incoming`."""
        return Partial(self._latent.values(part.out), part.lse)

    def merge(self, parts: Sequence[Partial]) -> Partial:
        """See `Form.merge`."""
        return self._kernels.backend.merge(parts)

    def _absorbed(self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows) -> Partial:
        kernels = self._kernels
        part = kernels.backend.attend(self._latent.absorb(q), runs, kv, kernels.heads.own, kernels.scale)
        return self.incoming(part.columns(kernels.value_dim))

    def _expanded(self, q: Tensor, sharers: Sequence[QueryRun], kv: CacheRows) -> Partial:
        """Runs that see prefixes of the first one's rows: a block is expanded once for all."""
        longest = sharers[0]
        parts: list[Partial] = []
        for start in range(0, longest.tokens, _EXPANDED_TOKENS):
            rows = kv.take(clip_spans(longest.spans, start, start + _EXPANDED_TOKENS)).read(q.dtype)[0, 0]
            seen = [
                QueryRun(run.row, run.length, (Span(0, min(run.tokens - start, len(rows))),))
                for run in sharers
                if run.tokens > start
            ]
            expanded = CacheRows(self._latent.expand(rows))
            part = self._kernels.backend.attend(q, seen, expanded, _each_head(q), self._kernels.scale)
            parts = [self.merge([*parts, part.columns(self.value_dim)])]
        return parts[0]


def _each_head(q: Tensor) -> tuple[HeadBlock, ...]:
    """Every query head on a KV head of its own."""
    return (HeadBlock(0, q.shape[1], 0, q.shape[1]),)


def _sharers(runs: Sequence[QueryRun]) -> Iterable[list[QueryRun]]:
    """Runs that see prefixes of the same rows, the longest first: segments of one request on one shard.

    Requests that share cached pages and then part see different rows, though they begin alike.
    """
    found: dict[int, list[list[QueryRun]]] = {}
    for run in sorted(runs, key=lambda run: -run.tokens):
        groups = found.setdefault(run.spans[0].slot, [])
        for group in groups:
            if tuple(clip_spans(group[0].spans, 0, run.tokens)) == run.spans:
                group.append(run)
                break
        else:
            groups.append([run])
    return [group for groups in found.values() for group in groups]
