"""Which part of each logical axis a rank holds: layers, query and KV heads, experts, ffn, vocabulary.

It owns the rules of tensor parallelism under context parallelism, and their checks; it must not know the names of
weights nor read any weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longspan.errors import ConfigError
from longspan.parallel.grid import Grid, split_evenly
from longspan.parallel.heads import HeadBlock, head_blocks, kv_range


@dataclass(frozen=True)
class Sharding:
    """One rank's part of a model.

    Query heads are split over the TP group. The ranks of a DCP group all hold the KV heads that the group's query heads
    read. A KV head is replicated if its query heads belong to more than one DCP group.
    """

    # all ranks
    grid: Grid
    # this rank
    rank: int
    # query heads of the model
    q_heads: int
    # KV heads of the model
    kv_heads: int

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of a logical axis of `size` items; on a head axis items are heads."""
        if axis == "kv_heads":
            return self.kv_extent
        holders = self._holders(axis)
        return split_evenly(size, len(holders), holders.index(self.rank))

    @property
    def q_extent(self) -> tuple[int, int]:
        """(start, stop) of this rank's query heads, counted in the model."""
        return self.extent("q_heads", self.q_heads)

    @property
    def kv_extent(self) -> tuple[int, int]:
        """(start, stop) of this rank's KV heads, counted in the model: those that its DCP group's query heads read."""
        return kv_range(self._group_q_extent, self._group)

    @property
    def own_blocks(self) -> tuple[HeadBlock, ...]:
        """Which of this rank's KV heads its own query heads read."""
        return self.blocks_of(self.rank)

    def blocks_of(self, member: int) -> tuple[HeadBlock, ...]:
        """Which of this rank's KV heads the query heads of `member`, a rank of the context group, read."""
        theirs = replace(self, rank=member).q_extent
        return head_blocks(theirs, self.kv_extent[0], self._group)

    @property
    def member_blocks(self) -> tuple[tuple[HeadBlock, ...], ...]:
        """`blocks_of` each rank of the context group, in shard order."""
        return tuple(self.blocks_of(member) for member in self.grid.context_group(self.rank))

    @property
    def shard_blocks(self) -> tuple[HeadBlock, ...]:
        """Which of this rank's KV heads all query heads of its DCP group read."""
        return head_blocks(self._group_q_extent, self.kv_extent[0], self._group)

    def _holders(self, axis: str) -> tuple[int, ...]:
        """The ranks over which an axis is split."""
        if axis == "layers":
            return self.grid.pipeline_group(self.rank)
        return self.grid.expert_holders(self.rank) if axis == "experts" else self.grid.tp_group(self.rank)

    @property
    def _group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def _group_q_extent(self) -> tuple[int, int]:
        return split_evenly(self.q_heads, self.grid.head_shards, self.grid.ranks[self.rank].head_shard)


def check_heads(grid: Grid, q_heads: int) -> None:
    """Raise `ConfigError` unless every rank gets the same number of query heads."""
    if q_heads % grid.tp:
        valid = ", ".join(str(n) for n in range(1, q_heads + 1) if q_heads % n == 0)
        raise ConfigError(
            "tensor_parallel_size", grid.tp, f"must divide the model's {q_heads} query heads",
            f"use one of {valid}, or spread the context with prefill_context_parallel_size",
        )  # fmt: skip


def max_kv_heads(grid: Grid, q_heads: int, kv_heads: int) -> int:
    """The largest number of KV heads that any rank stores.

    Pages are sized by it, because the pools of all head shards must have the same number of pages.
    """
    extents = [Sharding(grid, place.rank, q_heads, kv_heads).kv_extent for place in grid.ranks]
    return max(stop - start for start, stop in extents)


def check_layers(grid: Grid, num_layers: int) -> None:
    """Raise `ConfigError` unless every stage gets a layer."""
    if grid.pp > num_layers:
        raise ConfigError(
            "pipeline_parallel_size", grid.pp, f"exceeds the model's {num_layers} layers", f"use at most {num_layers}"
        )


def last_layers(grid: Grid, num_layers: int) -> int:
    """The number of layers of the last stage."""
    first, stop = split_evenly(num_layers, grid.pp, grid.pp - 1)
    return stop - first
