"""The attention of one rank: write KV, attend on and off the diagonal, merge (idea 4 of docs/architecture.md).

It owns the order of these operations in a layer. What travels is decided by the schedule, whether latents are absorbed
or expanded by the attention variant, and how a kernel computes by the backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.attention.pool import KVPool
from longspan.attention.prepared import DiagonalRows, PreparedReach, PreparedStep, Preparer
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

    @property
    def causal_runs(self) -> bool:
        """Whether segments read their own tokens from the cache, where they are local: see `rank_view`."""
        return self.ops.backend.causal_runs

    def map_peers(self) -> None:
        """Read the pages of all members of the context group in place from now on: see `KVPool.map_peers`."""
        self.pool.map_peers(self._group.collectives)

    def begin(self, step: PreparedStep) -> None:
        """Use this step in all following calls."""
        self._step = step

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, Dq], k and v [T, Hkv, D] of this rank's tokens → [T, Hq, Dv], in the dtype of q.

        k and v are also written to the pool.
        """
        kv = self.pool.layers[layer.index]
        whole_kv = self.pool.mapped.get(layer.index, kv)
        # writing comes first: local segments find their own tokens in the cache
        self._step.writer.write(kv, k, v)
        variant, group = self.ops.variant(layer), self._group_of[layer.window]
        dtype = q.dtype if layer.sink is None else None  # a sink is merged
        parts: list[AttentionState] = []
        for each in self._step.phases:
            rows = slice(each.start, each.stop)
            reached = each.groups[group]
            seen = whole_kv if reached.reach.in_place else kv
            parts += self._phase(reached, variant, seen, (q[rows], k[rows], v[rows]), dtype)
        if not parts:
            return q.new_zeros(*q.shape[:-1], variant.value_dim)
        whole = concatenate(parts)
        return (whole if layer.sink is None else with_sink(whole, layer.sink)).out.to(q.dtype)

    def _phase(
        self,
        prepared: PreparedReach,
        variant: AttentionVariant,
        kv: CacheRows,
        rows: tuple[Tensor, Tensor, Tensor],
        dtype: torch.dtype | None,
    ) -> Iterator[AttentionState]:
        """Attention of the rows of one phase, q [T, Hq, Dq], k and v [T, Hkv, D]: of local rows, of travelling rows.

        Local rows attend to this rank's pages, travelling rows through the schedule: all ranks take part in it if any
        row travels. Nothing is computed that sees nothing.
        """
        reach, backend = prepared.reach, self.ops.backend
        travel = reach.travel
        if travel:
            q, k, v = (x[:travel] for x in rows)
            alone = None if prepared.own and prepared.local_diagonal else dtype
            found = [_diagonal(prepared.local_diagonal, variant, kv, (q, k, v), alone)]
            found.append(variant.own(q, prepared.own, kv, alone) if prepared.own else None)
            parts = [part for part in found if part is not None]
            yield backend.merge(parts or [AttentionState.empty(travel, q.shape[1], variant.value_dim, q)], dtype)
        if sum(reach.block_rows):
            q, k, v = (x[travel:] for x in rows)
            alone = None if prepared.travelling_diagonal else dtype
            run = self.schedules[reach.schedule].run
            joined = run(Join(q, kv, prepared, variant, self._group, alone))
            diagonal = _diagonal(prepared.travelling_diagonal, variant, kv, (q, k, v))
            yield backend.merge([part for part in (diagonal, joined) if part is not None], dtype)


def _diagonal(
    pieces: Sequence[DiagonalRows],
    variant: AttentionVariant,
    kv: CacheRows,
    rows: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype | None = None,
) -> AttentionState | None:
    """Causal attention of segments to themselves, in rows q [T, Hq, Dq], k and v [T, Hkv, D]; None without any.

    Keys and values are attended as they read from the cache `kv`. The rows of lone tokens get the identity.
    """
    if not pieces:
        return None
    q, k, v = rows[0], through(rows[1], kv), through(rows[2], kv)  # only now: a step that decodes has no use for it
    within = ((slice(piece.start, piece.stop), piece) for piece in pieces)
    return concatenate([variant.diagonal(q[at], k[at], v[at], piece, dtype) for at, piece in within])
