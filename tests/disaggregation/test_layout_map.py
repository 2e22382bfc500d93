"""For any two layouts, every cache row of every token is fetched once, from a rank that has it."""

import random

import pytest

from longspan.cache.pages import PageRef, PageTable
from longspan.config import ParallelConfig
from longspan.disaggregation.layout_map import cells, runs_on
from longspan.disaggregation.pulls import PullTracker
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding, last_layers
from longspan.plan.source import Part

LAYERS = 5
HEADS = [(24, 4), (24, 24), (24, 1), (9, 3), (12, 6)]


def parts(grid: Grid, q_heads: int, kv_heads: int) -> tuple[Part, ...]:
    shares = [Sharding(grid, place.rank, q_heads, kv_heads) for place in grid.ranks]
    return tuple(
        Part(place.rank, place.shard, share.extent("layers", LAYERS), share.kv_extent)
        for place, share in zip(grid.ranks, shares, strict=True)
    )


def random_grid(dice: random.Random, q_heads: int) -> Grid:
    tp = dice.choice([n for n in (1, 2, 3, 4, 6) if q_heads % n == 0])
    dcp = dice.choice([n for n in range(1, tp + 1) if tp % n == 0])
    grid = Grid(ParallelConfig(tp, dice.randint(1, 3), dcp, dice.randint(1, 3)))
    assert last_layers(grid, LAYERS)
    return grid


def random_table(dice: random.Random, grid: Grid, tokens: int) -> PageTable:
    table = PageTable(dice.choice([1, 2, 3, 7, 16]), grid.num_shards)
    while len(table.pages) * table.page_size < tokens:
        table.append(PageRef(dice.randrange(grid.num_shards), dice.randrange(1000)))
    return table


@pytest.mark.parametrize("seed", range(150))
def test_every_row_arrives_once_from_a_rank_that_has_it(seed):
    dice = random.Random(seed)
    q_heads, kv_heads = dice.choice(HEADS)
    theirs, ours = random_grid(dice, q_heads), random_grid(dice, q_heads)
    tokens = dice.randint(1, 60)
    start = dice.randrange(tokens)
    source, goal = random_table(dice, theirs, tokens), random_table(dice, ours, tokens)
    parts_there = parts(theirs, q_heads, kv_heads)
    for mine in parts(ours, q_heads, kv_heads):
        wanted = runs_on(goal, mine.shard, start, tokens)
        found = cells(mine, parts_there)
        pulls = PullTracker(found, wanted, [dice.randint(1, 9) for _ in found])
        seen = set()
        for rank in dice.sample(sorted(pulls.ranks), len(pulls.ranks)):
            pulls.offer(rank, runs_on(source, parts_there[rank].shard, 0, tokens))
        while pull := pulls.next():
            there = parts_there[pull.rank]
            assert there.layers[0] <= pull.layers[0] and pull.layers[1] <= there.layers[1]
            assert there.heads[0] <= pull.heads[0] and pull.heads[1] <= there.heads[1]
            for low, high in pull.runs:
                assert all(source.shard_of(position) == there.shard for position in range(low, high))
                rows = {
                    (layer, head, position)
                    for layer in range(*pull.layers) for head in range(*pull.heads) for position in range(low, high)
                }  # fmt: skip
                assert not rows & seen
                seen |= rows
            pulls.received(pull)
        assert pulls.done
        assert seen == {
            (layer, head, position)
            for layer in range(*mine.layers) for head in range(*mine.heads)
            for run in wanted for position in range(*run)
        }  # fmt: skip


def test_replicas_fetch_from_different_ranks():
    latent = [Part(rank, 0, (0, 2), (0, 1)) for rank in range(4)]
    assert {cell.ranks for mine in latent for cell in cells(mine, latent)} == {(0,), (1,), (2,), (3,)}


def test_a_layer_that_no_rank_holds_is_an_error():
    with pytest.raises(ValueError, match="no rank holds layers 3"):
        cells(Part(0, 0, (0, 4), (0, 2)), [Part(0, 0, (0, 3), (0, 2))])


def test_a_kv_head_that_no_rank_holds_is_an_error():
    with pytest.raises(ValueError, match="no rank of the shard holds KV head 2"):
        cells(Part(0, 0, (0, 4), (0, 3)), [Part(0, 0, (0, 4), (0, 2))])


def one_cell(wanted, limit=100):
    part = Part(0, 0, (0, 1), (0, 1))
    return PullTracker(cells(part, [part]), wanted, [limit])


def test_a_token_that_is_offered_twice_is_requested_once():
    pulls = one_cell([(0, 8)])
    pulls.offer(0, [(0, 4)])
    assert pulls.next().runs == ((0, 4),)
    pulls.offer(0, [(0, 8)])
    assert pulls.next().runs == ((4, 8),)
    assert pulls.next() is None


def test_a_refused_token_is_requested_again_after_another_offer():
    pulls = one_cell([(0, 4)])
    pulls.offer(0, [(0, 4)])
    pulls.refused(pulls.next())
    assert pulls.next() is None
    pulls.offer(0, [(0, 4)])
    pulls.received(pulls.next())
    assert pulls.done


def test_a_pull_has_no_more_tokens_than_its_limit():
    pulls = one_cell([(2, 5), (9, 14)], limit=4)
    pulls.offer(0, [(0, 20)])
    assert [pulls.next().runs for _ in range(2)] == [((2, 5), (9, 10)), ((10, 14),)]


def test_a_rank_that_stores_no_token_is_done_and_needs_no_other_rank():
    pulls = one_cell([])
    assert pulls.done
    assert not pulls.ranks
