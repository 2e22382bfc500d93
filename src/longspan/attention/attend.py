"""One rank's attention: write own KV, diagonal ⊕ off-diagonal, merge (idea 4).

It owns the order of these within a layer; what travels is the schedule's business, in which form
queries meet keys `forms`', how a kernel computes the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longspan.attention.forms import Form, Kernels
from longspan.attention.layer import AttentionLayer
from longspan.attention.partial import Partial, concatenate, merge
from longspan.attention.pool import KVPool, SlotWriter
from longspan.attention.schedules import SCHEDULES, ContextGroup, Join
from longspan.view import ClassView, RankView


class Attention:
    """The attention of all layers on one rank; call `begin` with each step's view first."""

    def __init__(self, pool: KVPool, kernels: Kernels, group: ContextGroup) -> None:
        self.pool = pool
        self._kernels = kernels
        self._group = group
        self._classes: Sequence[ClassView] = ()
        self._writer = SlotWriter((), 0)

    def begin(self, view: RankView) -> None:
        """Prepare a step."""
        self._classes = view.classes
        self._writer = SlotWriter(view.writes, len(view.positions))

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's tokens: q [T, Hq, Dq], k and v [T, Hkv, D] → [T, Hq, value dim]."""
        kv = self.pool.layers[layer.index]
        self._writer.write(kv, k, v)
        form = self._kernels.form(layer.latent)
        parts = [self._attend_class(view, form, kv, q, k, v) for view in self._classes]
        if not parts:
            return q.new_zeros(*q.shape[:-1], form.value_dim)
        return concatenate(parts).out.to(q.dtype)

    def _attend_class(self, view: ClassView, form: Form, kv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        off = self._off_diagonal(view, form, kv, q)
        diagonal = self._diagonal(view, form, q, k, v)
        return merge([part for part in (diagonal, off) if part is not None])

    def _off_diagonal(self, view: ClassView, form: Form, kv: Tensor, q: Tensor) -> Partial | None:
        """Local rows see this rank's pages, travelling rows go through the schedule. None if no row sees any."""
        local = q[view.start : view.travel]
        parts: list[Partial] = []
        if sum(view.block_rows):
            join = Join(q[view.travel : view.stop], kv, view, form, self._group)
            parts.append(SCHEDULES[view.schedule](join))
        if len(local) or not (parts or view.diagonal):
            parts.insert(0, form.own(local, view.own, kv))
        return concatenate(parts) if parts else None

    def _diagonal(self, view: ClassView, form: Form, q: Tensor, k: Tensor, v: Tensor) -> Partial | None:
        """Every segment longer than one token against itself; None if there is none."""
        if not view.diagonal:
            return None
        parts: list[Partial] = []
        at = view.start
        for row, length in view.diagonal:
            start = view.start + row
            if start > at:
                parts.append(Partial.empty(start - at, q.shape[1], form.value_dim, q))
            at = start + length
            parts.append(form.diagonal(q[start:at], k[start:at], v[start:at]))
        if at < view.stop:
            parts.append(Partial.empty(view.stop - at, q.shape[1], form.value_dim, q))
        return concatenate(parts)
