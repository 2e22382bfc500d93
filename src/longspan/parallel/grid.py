"""Who the ranks are: every rank's coordinates and groups, named once.

It owns the order of ranks in the grid (pp, pcp, head_shard, dcp); nothing else derives one rank's
identity from another's number. It must not know what the ranks compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from longspan.config import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """One rank's place. `shard` is its index in its context group, and so the shard it stores."""

    rank: int
    pp: int
    pcp: int
    tp: int
    head_shard: int
    dcp: int
    shard: int


@dataclass(frozen=True)
class Grid:
    """The rank grid: world = pp · pcp · head_shards · dcp, with tp = head_shards · dcp.

    A *stage* is the ranks of one pp index: they hold the same layers. Inside a stage a *TP group* is the ranks of one
    pcp index, and a *context group* the pcp · dcp ranks that hold the same KV heads and different pages; its members
    are the shards, in the same order for every head shard and stage, so one page table serves all of them.
    """

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
        """Number of stages."""
        return self.parallel.pipeline_parallel_size

    @property
    def pcp(self) -> int:
        """Number of ranks that share a prompt's tokens."""
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
        """Members of a context group: pcp · dcp."""
        return 1 + max(place.shard for place in self.ranks)

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that split the heads of the same tokens as `rank`, in tp order."""
        mine = self.ranks[rank]
        return tuple(place.rank for place in self._stage(rank) if place.pcp == mine.pcp)

    def context_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same KV heads as `rank`, in shard order."""
        mine = [place for place in self._stage(rank) if place.head_shard == self.ranks[rank].head_shard]
        return tuple(place.rank for place in sorted(mine, key=lambda place: place.shard))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that compute the other layers of the same tokens and heads as `rank`, in stage order."""
        mine = self.ranks[rank]
        return tuple(p.rank for p in self.ranks if (p.pcp, p.tp) == (mine.pcp, mine.tp))

    def nodes(self, group: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The members of a group (by their place in it) that share a machine, machine by machine."""
        run = self.parallel.ranks_per_node or self.world_size
        of_rank = self.parallel.node_of_rank or [rank // run for rank in range(self.world_size)]
        nodes = [of_rank[rank] for rank in group]
        return tuple(tuple(place for place, node in enumerate(nodes) if node == one) for one in dict.fromkeys(nodes))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the stage that hold other tokens and, under expert parallelism, other experts; in pcp order."""
        return tuple(place.rank for place in self._stage(rank) if place.tp == self.ranks[rank].tp)

    def expert_holders(self, rank: int) -> tuple[int, ...]:
        """Ranks over which the experts of `rank`'s layers are split."""
        whole_stage = self.parallel.enable_expert_parallel
        return tuple(place.rank for place in self._stage(rank)) if whole_stage else self.tp_group(rank)

    def _stage(self, rank: int) -> list[Coordinates]:
        return [place for place in self.ranks if place.pp == self.ranks[rank].pp]

    @cached_property
    def pcp_of_shard(self) -> tuple[int, ...]:
        """For every shard, the pcp index whose ranks write it."""
        return tuple(pcp for _, pcp in sorted({(place.shard, place.pcp) for place in self.ranks}))

    @cached_property
    def shards_of_pcp(self) -> tuple[tuple[int, ...], ...]:
        """For every pcp index, the shards its ranks write, in dcp order."""
        return tuple(
            tuple(shard for shard, owner in enumerate(self.pcp_of_shard) if owner == pcp) for pcp in range(self.pcp)
        )

    def returns_tokens(self, rank: int) -> bool:
        """Whether this rank hands its TP group's sampled tokens to the driver."""
        place = self.ranks[rank]
        return place.tp == 0 and rank == self.pipeline_group(rank)[-1]


def split_evenly(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` when `size` items are cut into `parts` runs that differ by at most one."""
    return size * index // parts, size * (index + 1) // parts


def layouts(gpus: int, expert_parallel: bool = False) -> Iterator[ParallelConfig]:
    """Every pp x pcp x tp of so many devices, with every dcp that divides tp."""
    for pp in _divisors(gpus):
        for pcp in _divisors(gpus / pp):
            tp = int(gpus / pp / pcp)
            for dcp in _divisors(tp):
                yield ParallelConfig(tp, pcp, dcp, pp, enable_expert_parallel=expert_parallel)


def _divisors(number: float) -> list[int]:
    return [n for n in range(1, int(number) + 1) if number % n == 0]
