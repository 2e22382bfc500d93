"""Who the ranks are, and what each holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.config import ParallelConfig
from longspan.errors import ConfigError
from longspan.parallel.grid import Grid, split_evenly
from longspan.parallel.heads import head_blocks
from longspan.parallel.sharding import Sharding, check_heads, max_kv_heads

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # head shards, pcp, dcp


@given(SIZES)
def test_groups_partition_the_ranks(sizes):
    head_shards, pcp, dcp = sizes
    grid = Grid(ParallelConfig(head_shards * dcp, pcp, dcp))
    ranks = set(range(grid.world_size))
    assert {rank for r in ranks for rank in grid.tp_group(r)} == ranks
    for rank in ranks:
        place = grid.ranks[rank]
        assert grid.tp_group(rank)[place.tp] == rank
        assert grid.context_group(rank)[place.shard] == rank
        assert grid.pcp_of_shard[place.shard] == place.pcp
        assert place.shard in grid.shards_of_pcp[place.pcp]
    assert grid.num_shards == pcp * dcp
    assert sum(grid.returns_tokens(rank) for rank in ranks) == pcp


@given(SIZES, st.integers(1, 3), st.integers(1, 6))
def test_every_query_head_reads_its_own_kv_head(sizes, multiple, kv_heads):
    head_shards, pcp, dcp = sizes
    tp = head_shards * dcp
    q_heads = tp * multiple * kv_heads
    grid = Grid(ParallelConfig(tp, pcp, dcp))
    seen = []
    for rank in grid.tp_group(0):
        sharding = Sharding(grid, rank, q_heads, kv_heads)
        q_start, _ = sharding.q_extent
        kv_start, kv_stop = sharding.kv_extent
        for block in sharding.own_blocks:
            for q in range(block.q_start, block.q_stop):
                kv = kv_start + block.kv_start + (q - block.q_start) // block.group
                assert kv == (q_start + q) // (q_heads // kv_heads)
                assert kv < kv_stop
                seen.append(q_start + q)
    assert sorted(seen) == list(range(q_heads))


def test_a_group_that_straddles_kv_heads_is_cut_into_uniform_blocks():
    blocks = head_blocks((3, 9), 0, 4)
    assert [(b.q_start, b.q_stop, b.kv_start, b.kv_stop) for b in blocks] == [
        (0, 1, 0, 1), (1, 5, 1, 2), (5, 6, 2, 3),
    ]  # fmt: skip


def test_more_tp_ranks_than_kv_heads_replicate_them_and_dcp_takes_the_copies_back():
    assert max_kv_heads(Grid(ParallelConfig(8, 1, 1)), 8, 2) == 1
    assert max_kv_heads(Grid(ParallelConfig(8, 1, 8)), 8, 2) == 2


def test_impossible_tp_names_the_valid_sizes():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2.*9 query heads.*1, 3, 9"):
        check_heads(Grid(ParallelConfig(2, 1, 1)), 9)


def test_dcp_must_divide_tp():
    with pytest.raises(ConfigError, match=r"decode_context_parallel_size=3.*tensor_parallel_size=4.*1, 2, 4"):
        ParallelConfig(4, 1, 3)


@given(st.integers(0, 100), st.integers(1, 9))
def test_split_evenly_differs_by_at_most_one(size, parts):
    runs = [split_evenly(size, parts, index) for index in range(parts)]
    assert [start for start, _ in runs] == [0, *[stop for _, stop in runs[:-1]]]
    assert runs[-1][1] == size
    lengths = [stop - start for start, stop in runs]
    assert max(lengths) - min(lengths) <= 1
