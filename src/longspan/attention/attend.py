"""The attention of one rank: write KV, attend on and off the diagonal, merge (idea 4 of docs/architecture.md).

It owns the order of these operations in a layer. What travels is decided by the schedule, whether latents are absorbed
or expanded by the attention variant, and how a kernel computes by the backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.attention.pool import KVPool
from longspan.attention.prepared import PreparedReach, PreparedStep, Preparer
from longspan.attention.rows import CacheRows, through
from longspan.attention.schedules import SCHEDULES, ContextGroup, Join, Schedule
from longspan.attention.state import AttentionState, concatenate, with_sink
from longspan.attention.variants import AttentionOps, AttentionVariant


class Attention:
    """The attention of all layers on one rank. Call `begin` with each step before its first layer."""

    def __init__(
        self,
        pool: KVPool,
        ops: AttentionOps,
        group: ContextGroup,
        windows: Sequence[int | None],
        schedules: Mapping[str, Schedule] = SCHEDULES,
    ) -> None:
        self.pool = pool
        self.ops = ops
        self._group = group
        # width of window of each layer group, widest first
        self.windows = tuple(windows)
        self.schedules = schedules
        # what travels under each schedule
        self.moves = {name: schedule.moves for name, schedule in schedules.items()}
        # number of the layer group, by width of window
        self._group_of = {window: group for group, window in enumerate(windows)}
        self._step = PreparedStep((), ops.backend.writer((), 0))

    @property
    def preparer(self) -> Preparer:
        """Prepares the steps that are passed to `begin`."""
        return Preparer(self.ops.backend, self.ops.expansion, self.windows)

    def begin(self, step: PreparedStep) -> None:
        """Use this step in all following calls."""
        self._step = step

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, Dq], k and v [T, Hkv, D] of this rank's tokens → [T, Hq, Dv], in the dtype of q.

        k and v are also written to the pool.
        """
        kv = self.pool.layers[layer.index]
        # writing comes first: a segment of one token finds its own key in the cache
        self._step.writer.write(kv, k, v)
        variant, group = self.ops.variant(layer), self._group_of[layer.window]
        parts: list[AttentionState] = []
        for each in self._step.phases:
            rows, prepared = slice(each.start, each.stop), each.groups[group]
            off = self._off_diagonal(prepared, variant, kv, q[rows])
            diagonal = _diagonal(prepared, variant, kv, q[rows], k[rows], v[rows])
            parts.append(self.ops.backend.merge([part for part in (diagonal, off) if part is not None]))
        if not parts:
            return q.new_zeros(*q.shape[:-1], variant.value_dim)
        whole = concatenate(parts)
        return (whole if layer.sink is None else with_sink(whole, layer.sink)).out.to(q.dtype)

    def _off_diagonal(
        self, prepared: PreparedReach, variant: AttentionVariant, kv: CacheRows, q: Tensor
    ) -> AttentionState | None:
        """Attention of q [T, Hq, Dq], the rows of one phase, to all earlier tokens.

        Local rows attend to this rank's pages, travelling rows through the schedule. None if no row is local and none
        travels, on any rank.
        """
        reach = prepared.reach
        local = q[: reach.travel]
        parts: list[AttentionState] = []
        if sum(reach.block_rows):
            schedule = self.schedules[reach.schedule]
            parts.append(schedule.run(Join(q[reach.travel :], kv, prepared, variant, self._group)))
        if len(local) or not (parts or prepared.diagonal):  # a phase without rows here still needs an empty state
            parts.insert(0, variant.own(local, prepared.own, kv))
        return concatenate(parts) if parts else None


def _diagonal(
    prepared: PreparedReach, variant: AttentionVariant, kv: CacheRows, q: Tensor, k: Tensor, v: Tensor
) -> AttentionState | None:
    """Causal attention of each segment longer than one token to itself, in one phase's rows; None without any.

    q [T, Hq, Dq], k and v [T, Hkv, D], which are attended as they read from the cache `kv`. The rows of lone tokens get
    the identity.
    """
    if not prepared.diagonal:
        return None
    k, v = through(k, kv), through(v, kv)  # only now: a step that decodes has no use for it
    parts: list[AttentionState] = []
    at = 0
    for row, length, diagonal in prepared.diagonal:
        if row > at:
            parts.append(AttentionState.empty(row - at, q.shape[1], variant.value_dim, q))
        at = row + length
        parts.append(variant.diagonal(q[row:at], k[row:at], v[row:at], diagonal))
    if at < len(q):
        parts.append(AttentionState.empty(len(q) - at, q.shape[1], variant.value_dim, q))
    return concatenate(parts)
