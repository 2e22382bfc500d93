"""The grid of ranks: the coordinates and the groups of every rank.

It owns the order of ranks in the grid (pp, pcp, head_shard, dcp); no other module computes one rank's number or
coordinates from another's. It must not know what the ranks compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from longspan.config import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one rank."""

    # number in the world
    rank: int
    # pipeline stage
    pp: int
    # pcp index: which of the prompt's tokens it computes
    pcp: int
    # index in the TP group
    tp: int
    # DCP group in the TP group: which KV heads it holds
    head_shard: int
    # index in the DCP group
    dcp: int
    # index in the context group: which pages it stores
    shard: int


@dataclass(frozen=True)
class Grid:
    """The rank grid: world = pp · pcp · head_shards · dcp, with tp = head_shards · dcp.

    The ranks of one pp index are a *stage*: they hold the same layers. The ranks of one pcp index in a stage are a
    *TP group*. The pcp · dcp ranks of a stage that hold the same KV heads and different pages are a *context group*.
    Its members are the shards. They have the same order in every head shard and stage, so one page table serves all.
    """

    # the sizes of the grid
    parallel: ParallelConfig

    @cached_property
    def ranks(self) -> tuple[Coordinates, ...]:
        """All ranks in rank order."""
        dcp = self.parallel.decode_context_parallel_size
        places = product(range(self.pp), range(self.pcp), range(self.head_shards), range(dcp))
        shard_numbers: dict[tuple[int, int], int] = {}
        found: list[Coordinates] = []
        for rank, (pp, pcp, head_shard, member) in enumerate(places):
            shard = shard_numbers.setdefault((pcp, member), len(shard_numbers))
            tp = sum((other.pp, other.pcp) == (pp, pcp) for other in found)
            found.append(Coordinates(rank, pp, pcp, tp, head_shard, member, shard))
        return tuple(found)

    @property
    def pp(self) -> int:
        """Number of pipeline stages."""
        return self.parallel.pipeline_parallel_size

    @property
    def pcp(self) -> int:
        """Number of pcp indices, over which a prompt's tokens are split."""
        return self.parallel.prefill_context_parallel_size

    @property
    def head_shards(self) -> int:
        """Number of DCP groups in a TP group: tp / dcp."""
        return self.parallel.tensor_parallel_size // self.parallel.decode_context_parallel_size

    @property
    def tp(self) -> int:
        """Size of a TP group."""
        return self.parallel.tensor_parallel_size

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @cached_property
    def num_shards(self) -> int:
        """Number of members of a context group: pcp · dcp."""
        return 1 + max(place.shard for place in self.ranks)

    @cached_property
    def one_stage(self) -> Grid:
        """The ranks of one stage as a grid of their own, over which a model is split that has no stages.

        Its experts are split over the TP group.
        """
        alone = replace(
            self.parallel, pipeline_parallel_size=1, enable_expert_parallel=False, ranks_per_node=None, node_of_rank=()
        )
        return Grid(alone)

    def rank_in_stage(self, rank: int) -> int:
        """The number of a rank in `one_stage`."""
        mine = self.ranks[rank]
        return next(p.rank for p in self.one_stage.ranks if (p.pcp, p.tp) == (mine.pcp, mine.tp))

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that split the heads of the same tokens as `rank`, in tp order."""
        mine = self.ranks[rank]
        return tuple(place.rank for place in self._stage(rank) if place.pcp == mine.pcp)

    def context_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same KV heads as `rank`, in shard order."""
        mine = [place for place in self._stage(rank) if place.head_shard == self.ranks[rank].head_shard]
        return tuple(place.rank for place in sorted(mine, key=lambda place: place.shard))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of all stages that have the coordinates of `rank` but for pp, in stage order."""
        mine = self.ranks[rank]
        return tuple(p.rank for p in self.ranks if (p.pcp, p.tp) == (mine.pcp, mine.tp))

    def nodes(self, group: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The members of a group, as indices into it, by the machine that they are on."""
        run = self.parallel.ranks_per_node or self.world_size
        of_rank = self.parallel.node_of_rank or [rank // run for rank in range(self.world_size)]
        nodes = [of_rank[rank] for rank in group]
        return tuple(tuple(place for place, node in enumerate(nodes) if node == one) for one in dict.fromkeys(nodes))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the stage with the tp index of `rank`, in pcp order: they compute different tokens.

        With expert parallelism they also hold different experts, so this is the group that exchanges rows.
        """
        return tuple(place.rank for place in self._stage(rank) if place.tp == self.ranks[rank].tp)

    def expert_holders(self, rank: int) -> tuple[int, ...]:
        """Ranks over which a layer's experts are split: with expert parallelism the stage, else the TP group."""
        whole_stage = self.parallel.enable_expert_parallel
        return tuple(place.rank for place in self._stage(rank)) if whole_stage else self.tp_group(rank)

    def _stage(self, rank: int) -> list[Coordinates]:
        return [place for place in self.ranks if place.pp == self.ranks[rank].pp]

    @cached_property
    def pcp_of_shard(self) -> tuple[int, ...]:
        """For every shard, the pcp index of the ranks that store it."""
        return tuple(pcp for _, pcp in sorted({(place.shard, place.pcp) for place in self.ranks}))

    @cached_property
    def shards_of_pcp(self) -> tuple[tuple[int, ...], ...]:
        """For every pcp index, the shards that its ranks store, in dcp order."""
        return tuple(
            tuple(shard for shard, owner in enumerate(self.pcp_of_shard) if owner == pcp) for pcp in range(self.pcp)
        )

    def returns_tokens(self, rank: int) -> bool:
        """Whether this rank returns its TP group's sampled tokens to the driver: tp 0 of the last stage."""
        place = self.ranks[rank]
        return place.tp == 0 and rank == self.pipeline_group(rank)[-1]


def split_evenly(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` of `size` items that are cut into `parts` runs, equal in length to within one."""
    return size * index // parts, size * (index + 1) // parts


def layouts(gpus: int, expert_parallel: bool = False) -> Iterator[ParallelConfig]:
    """Every layout of `gpus` devices: all pp, pcp and tp with this product, and every dcp that divides tp."""
    for pp in _divisors(gpus):
        for pcp in _divisors(gpus / pp):
            tp = int(gpus / pp / pcp)
            for dcp in _divisors(tp):
                yield ParallelConfig(tp, pcp, dcp, pp, enable_expert_parallel=expert_parallel)


def _divisors(number: float) -> list[int]:
    return [n for n in range(1, int(number) + 1) if number % n == 0]
