"""One rank's attention: write own KV, diagonal ⊕ off-diagonal, merge (idea 4).

It owns the order of these within a layer; what travels is the schedule's business, in which form
queries meet keys `forms`', how a kernel computes the backend's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from longspan.attention.backends.base import Writer
from longspan.attention.forms import Form, Kernels
from longspan.attention.layer import AttentionLayer
from longspan.attention.partial import Partial, concatenate, with_sink
from longspan.attention.pool import KVPool
from longspan.attention.rows import CacheRows, through
from longspan.attention.schedules import SCHEDULES, ContextGroup, Join, Schedule
from longspan.plan.reach import Reach
from longspan.plan.view import ClassView, RankView


class Attention:
    """The attention of all layers on one rank; call `begin` with each step's view first.

    `windows` are the kinds of layers a view has, in its order; `moves` is what travels under each schedule.
    """

    def __init__(
        self,
        pool: KVPool,
        kernels: Kernels,
        group: ContextGroup,
        windows: Sequence[int | None],
        schedules: Mapping[str, Schedule] = SCHEDULES,
    ) -> None:
        self.pool = pool
        self.kernels = kernels
        self._group = group
        self.windows = tuple(windows)
        self._schedules = schedules
        self.moves = {name: schedule.moves for name, schedule in schedules.items()}
        self._kind_of = {window: kind for kind, window in enumerate(windows)}
        self._classes: Sequence[ClassView] = ()
        self._writer: Writer = kernels.backend.writer((), 0)

    def begin(self, view: RankView) -> None:
        """Prepare a step."""
        self._classes = view.classes
        self.kernels.backend.begin()
        self._writer = self.kernels.backend.writer(view.writes, len(view.positions))

    def resume(self, classes: Sequence[ClassView], writer: Writer) -> None:
        """Prepare a step whose rows and slots are where a recording looks for them."""
        self._classes = classes
        self._writer = writer

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's tokens: q [T, Hq, Dq], k and v [T, Hkv, D] → [T, Hq, value dim]."""
        kv = self.pool.layers[layer.index]
        self._writer.write(kv, k, v)
        form, kind = self.kernels.form(layer), self._kind_of[layer.window]
        parts: list[Partial] = []
        for view in self._classes:
            rows = slice(view.start, view.stop)
            off = self._off_diagonal(view, view.kinds[kind], form, kv, q[rows])
            diagonal = (
                _diagonal(view, form, q[rows], through(k[rows], kv), through(v[rows], kv)) if view.diagonal else None
            )
            parts.append(self.kernels.backend.merge([part for part in (diagonal, off) if part is not None]))
        if not parts:
            return q.new_zeros(*q.shape[:-1], form.value_dim)
        whole = concatenate(parts)
        return (whole if layer.sink is None else with_sink(whole, layer.sink)).out.to(q.dtype)

    def _off_diagonal(self, view: ClassView, reach: Reach, form: Form, kv: CacheRows, q: Tensor) -> Partial | None:
        """Local rows see this rank's pages, travelling rows go through the schedule. None if no row sees any."""
        local = q[: reach.travel]
        parts: list[Partial] = []
        if sum(reach.block_rows):
            schedule = self._schedules[reach.schedule]
            parts.append(schedule.run(Join(q[reach.travel :], kv, reach, form, self._group)))
        if len(local) or not (parts or view.diagonal):
            parts.insert(0, form.own(local, reach.own, kv))
        return concatenate(parts) if parts else None


def _diagonal(view: ClassView, form: Form, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Every segment longer than one token of a class's rows against itself."""
    parts: list[Partial] = []
    at = 0
    for row, length in view.diagonal:
        if row > at:
            parts.append(Partial.empty(row - at, q.shape[1], form.value_dim, q))
        at = row + length
        parts.append(form.diagonal(q[row:at], k[row:at], v[row:at]))
    if at < len(q):
        parts.append(Partial.empty(len(q) - at, q.shape[1], form.value_dim, q))
    return concatenate(parts)
