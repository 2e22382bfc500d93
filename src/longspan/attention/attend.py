"""One rank's attention: write own KV, diagonal ⊕ off-diagonal, merge (idea 4).

It owns the order of these within a layer; what travels is the schedule's business, how a kernel
computes the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longspan.attention.backends.base import Backend
from longspan.attention.expansion import Expansion
from longspan.attention.heads import HeadBlock
from longspan.attention.partial import Partial, concatenate, merge
from longspan.attention.pool import KVPool, SlotWriter
from longspan.attention.schedules import SCHEDULES, Heads, Join
from longspan.parallel.collectives import Collectives
from longspan.view import ClassView, RankView


class Attention:
    """The attention of all layers on one rank; call `begin` with each step's view first."""

    def __init__(
        self,
        pool: KVPool,
        backend: Backend,
        group: Collectives,
        heads: Heads,
        scale: float,
        workspace_tokens: int,
        value_dim: int,
        expand_from: int,
    ) -> None:
        self.pool = pool
        self._backend = backend
        self._group = group
        self._heads = heads
        self._scale = scale
        self._workspace_tokens = workspace_tokens
        self._value_dim = value_dim
        self._expand_from = expand_from
        self._classes: Sequence[ClassView] = ()
        self._writer = SlotWriter((), 0)

    def begin(self, view: RankView) -> None:
        """Prepare a step."""
        self._classes = view.classes
        self._writer = SlotWriter(view.writes, len(view.positions))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, expansion: Expansion | None = None) -> Tensor:
        """Attention of this rank's tokens: q [T, Hq, D], k and v [T, Hkv, D] → [T, Hq, value dim].

        With an `expansion` the cache holds latents: long segments attend to themselves in its per-head form, and
        results are mapped to values before they are merged, which is exact since the map is linear.
        """
        kv = self.pool.layers[layer]
        self._writer.write(kv, k, v)
        parts = [self._attend_class(view, kv, q, k, v, expansion) for view in self._classes]
        if parts:
            return concatenate(parts).out.to(q.dtype)
        nothing = q.new_zeros(*q.shape[:-1], self._value_dim)
        return expansion.values(nothing) if expansion else nothing

    def _attend_class(
        self, view: ClassView, kv: Tensor, q: Tensor, k: Tensor, v: Tensor, expansion: Expansion | None
    ) -> Partial:
        off = self._off_diagonal(view, kv, q)
        diagonal = self._diagonal(view, q, k, v, expansion)
        parts = [diagonal, None if off is None else _as_values(off, expansion)]
        return merge([part for part in parts if part is not None])

    def _off_diagonal(self, view: ClassView, kv: Tensor, q: Tensor) -> Partial | None:
        """Local rows see this rank's pages, travelling rows go through the schedule. None if no row sees any."""
        local = q[view.start : view.travel]
        parts: list[Partial] = []
        if sum(view.block_rows):
            join = Join(
                q[view.travel : view.stop], kv, view, self._heads, self._scale,
                self._backend, self._group, self._workspace_tokens, self._value_dim,
            )  # fmt: skip
            parts.append(SCHEDULES[view.schedule](join))
        if len(local) or not (parts or view.diagonal):
            own = self._backend.unmasked(local, view.own, kv, self._heads.own, self._scale)
            parts.insert(0, own.columns(self._value_dim))
        return concatenate(parts) if parts else None

    def _diagonal(
        self, view: ClassView, q: Tensor, k: Tensor, v: Tensor, expansion: Expansion | None
    ) -> Partial | None:
        """Every segment longer than one token against itself; None if there is none."""
        if not view.diagonal:
            return None
        width = expansion.value_dim if expansion else self._value_dim
        parts: list[Partial] = []
        at = view.start
        for row, length in view.diagonal:
            start = view.start + row
            if start > at:
                parts.append(Partial.empty(start - at, q.shape[1], width, q))
            at = start + length
            parts.append(self._segment(slice(start, at), q, k, v, expansion))
        if at < view.stop:
            parts.append(Partial.empty(view.stop - at, q.shape[1], width, q))
        return concatenate(parts)

    def _segment(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, expansion: Expansion | None) -> Partial:
        """One segment against itself."""
        if expansion is not None and rows.stop - rows.start >= self._expand_from:
            each = (HeadBlock(0, q.shape[1], 0, q.shape[1]),)
            return self._backend.causal(*expansion.heads(rows), each, self._scale)
        part = self._backend.causal(q[rows], k[rows], v[rows], self._heads.own, self._scale)
        return _as_values(part.columns(self._value_dim), expansion)


def _as_values(part: Partial, expansion: Expansion | None) -> Partial:
    return Partial(expansion.values(part.out), part.lse) if expansion else part
