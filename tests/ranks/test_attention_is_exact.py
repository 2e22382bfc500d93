"""Sharded attention equals dense causal attention, whatever the layout: in fp64, to rounding."""

from dataclasses import replace

import pytest
import torch

from longspan.attention.backends.batch import batches
from longspan.attention.backends.compiled import CompiledBackend
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.backends.reference import ReferenceBackend
from longspan.attention.rows import CacheRows
from longspan.cache.pages import Span
from longspan.compiled.library import problem_of_kernels
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from tests.ranks.attention_world import Layout, World
from tests.traffic import IN_PLACE, TRAVELLING

MOVING = [*TRAVELLING, *IN_PLACE]
GRIDS = [
    (1, 1, 1),
    (1, 2, 1),
    (1, 3, 1),
    (1, 4, 1),
    (1, 8, 1),
    (2, 1, 1),
    (2, 1, 2),
    (3, 1, 3),
    (4, 1, 2),
    (4, 1, 4),
    (2, 2, 1),
    (2, 2, 2),
    (2, 3, 2),
    (4, 2, 2),
    (6, 1, 3),
]  # fmt: skip  (tp, pcp, dcp)
FEWER = [(1, 2, 1), (1, 8, 1), (3, 1, 3), (2, 3, 2)]
SCHEDULES_ON_GRIDS = [("gather_q", grid) for grid in GRIDS] + [
    (schedule, grid) for schedule in ("auto", *MOVING) if schedule != "gather_q" for grid in FEWER
]
SCHEDULES_AND_BUDGETS = [(schedule, 17) for schedule in MOVING] + [
    (schedule, budget) for schedule in ("gather_q", "gather_kv") for budget in (3, 64)
]
compiled = pytest.mark.skipif(problem_of_kernels() is not None, reason=f"no kernels: {problem_of_kernels()}")
HEADS = [(12, 12), (12, 3), (12, 1)]  # MHA, GQA, MQA


def assert_exact(world):
    """Every row was right, and where a schedule is forced this one moved something, and no other."""
    assert world.worst_error < 1e-13
    if world.layout.schedule in IN_PLACE:  # a step that sees earlier keys only sends nothing
        expected = {world.layout.schedule} if world.grid.num_shards > 1 else set()
        assert world.planned - {"local"} == expected >= world.moved
    elif world.layout.schedule != "auto":
        assert world.moved == ({world.layout.schedule} if world.grid.num_shards > 1 else set())


@pytest.mark.parametrize(("schedule", "grid"), SCHEDULES_ON_GRIDS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}over{h[1]}")
def test_every_row_equals_dense_attention(grid, heads, schedule):
    tp, pcp, dcp = grid
    world = World(Layout(tp, pcp, dcp, *heads, page_size=4, schedule=schedule, budget=40))
    world.add("0", [1] * 61, 4)
    world.add("1", [2] * 7, 6)
    world.add("2", [3], 3)
    world.run()
    assert_exact(world)


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 3, 2)], ids=str)
def test_several_requests_travel_in_one_step(grid, schedule):
    world = World(Layout(*grid, 12, 3, page_size=4, schedule=schedule, budget=160))
    for number, length in enumerate((30, 41, 37)):
        world.add(str(number), [number] * 2 * length, 5)
    world.run()
    for prefill in (False, True):
        together = [
            {s.request_id for s in plan.segments if s.num_remote_groups and s.prefill == prefill}
            for plan in world.plans
        ]
        assert max(map(len, together)) >= 2
    assert_exact(world)


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize(("schedule", "budget"), SCHEDULES_AND_BUDGETS)
def test_any_page_size_and_chunk_size(page_size, budget, schedule):
    world = World(Layout(2, 2, 2, page_size=page_size, budget=budget, pages=128 // page_size + 2, schedule=schedule))
    world.add("0", [1] * 70, 5)
    world.run()
    assert_exact(world)


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
@pytest.mark.parametrize("grid", [(1, 7, 1), (2, 3, 2)], ids=str)
def test_states_are_merged_inside_machines_of_any_size(grid, ranks_per_node):
    tp, pcp, dcp = grid
    world = World(Layout(tp, pcp, dcp, 12, 3, schedule="tree_q", budget=40, ranks_per_node=ranks_per_node))
    world.add("0", [1] * 61, 4)
    world.add("1", [2] * 7, 6)
    world.run()
    assert_exact(world)


WINDOWS = [(3,), (None, 16, 1), (40, 12)]
WINDOWS_ON_GRIDS = [(grid, windows) for grid in ((1, 2, 1), (3, 1, 3)) for windows in WINDOWS]
WINDOWS_ON_GRIDS += [((2, 3, 2), (40, 16, 1))]


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize(("grid", "windows"), WINDOWS_ON_GRIDS, ids=str)
def test_windowed_layers_see_their_window_and_no_more(grid, schedule, windows):
    tp, pcp, dcp = grid
    world = World(Layout(tp, pcp, dcp, 12, 3, page_size=4, schedule=schedule, budget=40, windows=windows))
    world.add("0", [1] * 61, 4)
    world.add("1", [2] * 7, 12)
    world.add("2", [3], 3)
    world.run()
    assert_exact(world)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(("schedule", "budget"), SCHEDULES_AND_BUDGETS)
def test_windows_of_any_page_and_chunk_size(page_size, budget, schedule):
    pages = 128 // page_size + 2
    layout = Layout(2, 2, 2, page_size=page_size, budget=budget, pages=pages, schedule=schedule, windows=(None, 9))
    world = World(layout)
    world.add("0", [1] * 70, 5)
    world.run()
    world.add("1", [1] * 33 + [2] * 20, 5)
    world.run()
    assert_exact(world)


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize("pcp", [2, 4])
def test_requests_that_travel_in_some_layers_and_not_in_others(pcp, schedule):
    world = World(Layout(pcp=pcp, page_size=4, schedule=schedule, budget=48, local_context=8, windows=(None, 11, 3)))
    for number, length in enumerate((1, 3, 16, 33, 100)):
        world.add(str(number), [number] * length, 10)
    world.run()
    kinds = {segment.num_remote_groups for plan in world.plans for segment in plan.segments}
    assert kinds == {0, 1, 2, 3}
    assert_exact(world)


def test_windows_through_a_workspace_of_one_token_a_shard():
    world = World(Layout(pcp=2, schedule="gather_kv", workspace_tokens=2, windows=(None, 7)))
    world.add("0", [1] * 40, 3)
    world.run()
    assert_exact(world)


def test_the_fast_backend_under_windows_is_the_slow_one():
    for windows in WINDOWS:
        world = World(
            Layout(pcp=2, q_heads=6, kv_heads=2, page_size=4, budget=600, pages=200, windows=windows),
            backend=CpuBackend(),
        )
        world.add("0", [1] * 600, 3)
        world.run()
        assert world.worst_error < 1e-10


def test_what_lies_before_a_window_does_not_travel():
    def bytes_of(windows):
        world = World(Layout(pcp=2, page_size=4, schedule="gather_kv", budget=64, windows=windows))
        world.add("0", [1] * 64, 1)
        world.run()
        world.add("1", [1] * 60 + [2] * 60, 1)
        world.run()
        return sum(traffic.bytes_by_label["gather_kv"] for traffic in world.traffic)

    assert bytes_of((8,)) < bytes_of((None,)) / 4


@pytest.mark.parametrize("schedule", MOVING)
def test_pages_outside_the_window_of_a_layer_are_not_read(schedule):
    world = World(Layout(pcp=2, page_size=4, budget=64, schedule=schedule, windows=(8,)))
    world.add("0", [1] * 50, 12)
    world.run(steps=1)
    for rank, mirror in enumerate(world.mirrors):
        for span in mirror.table("0").spans(world.grid.ranks[rank].shard, 50 - 8 + 1):
            world.attentions[rank].pool.layers[0].values[:, :, span.slot : span.slot + span.length] = float("nan")
    world.run()
    assert_exact(world)


THROUGH_SHARDS = {
    "windows, pcp": Layout(1, 2, 1, 12, 3, page_size=4, windows=(None, 9, 3)),
    "windows, dcp": Layout(3, 1, 3, 12, 3, page_size=4, windows=(40, 12)),
    "both, pages of a token": Layout(2, 3, 2, 12, 3, page_size=1),
    "both, heads": Layout(4, 2, 2, page_size=3, windows=(None, 9)),
    "quantised": Layout(2, 1, 2, page_size=4, cache_dtype=torch.int8),
    "homes": Layout(2, 2, 2, page_size=64, pages=4, local_context=16),
}


@pytest.mark.parametrize("layout", THROUGH_SHARDS)
def test_rows_that_read_their_own_tokens_on_the_shards_that_store_them_need_no_diagonal(layout):
    """First and later chunks that begin within pages, decode rows beside them, and a prefix hit."""
    world = World(replace(THROUGH_SHARDS[layout], schedule="gather_q", budget=38, through_shards=True))
    world.add("0", [1] * 61, 4)
    world.add("1", [2] * 7, 6)
    world.add("2", [3], 3)
    world.run()
    world.add("3", [1] * 33 + [2] * 20, 5)
    world.run()
    assert_exact(world)


@pytest.mark.parametrize("shared", range(21))
def test_prefix_hits_of_every_length(shared):
    world = World(Layout(pcp=3, page_size=1, pages=40))
    world.add("0", [1] * 20, 2)
    world.run()
    world.add("1", [1] * shared + [2] * (20 - shared), 2)
    world.run()
    hit = next(s.start for s in world.plans[-2].segments if s.request_id == "1")
    assert hit == min(shared, 19)
    assert_exact(world)


def test_workspace_of_one_token_a_shard_gives_the_same():
    world = World(Layout(pcp=2, schedule="gather_kv", workspace_tokens=2))
    world.add("0", [1] * 40, 3)
    world.run()
    assert_exact(world)


def test_short_contexts_stay_on_one_shard_and_move_nothing():
    world = World(Layout(pcp=4, local_context=32, budget=64))
    for request_id in range(6):
        world.add(str(request_id), [request_id] * 20, 8)
    world.run()
    assert all(not segment.num_remote_groups for plan in world.plans for segment in plan.segments)
    assert sum(sum(t.bytes_by_label.values()) for t in world.traffic) == 0
    assert {s.pcp for plan in world.plans for s in plan.segments} == {0, 1, 2, 3}


def test_a_growing_context_spreads_without_moving_a_page():
    world = World(Layout(pcp=3, local_context=16, page_size=4))
    world.add("0", [1] * 10, 60)
    world.run()
    shards = [page.shard for plan in world.plans for new in plan.new_pages for page in new.pages]
    assert len(set(shards[:4])) == 1, "the first 16 tokens live on one shard"
    assert [shards.count(s) for s in range(3)] == [6, 6, 6], "then it evens out"
    assert_exact(world)


def test_shards_of_unequal_size_fill_one_after_the_other():
    world = World(Layout(pcp=3, page_size=4, pages=(2, 30, 5)))
    world.add("0", [1] * 120, 4)
    world.run()
    assert_exact(world)


def test_more_requests_than_memory_are_preempted_and_stay_exact():
    world = World(Layout(pcp=2, page_size=2, pages=12, budget=16))
    for request_id in range(5):
        world.add(str(request_id), [request_id] * 9, 12)
    world.run()
    assert world.scheduler.preemptions > 0
    assert_exact(world)


@pytest.mark.parametrize("backend", [CpuBackend, pytest.param(CompiledBackend, marks=compiled)])
def test_the_backends_of_a_cpu_equal_the_reference_in_fp32(backend):
    windows = Layout(2, head_dim=16, windows=(None, 9))
    for layout in (Layout(pcp=2, head_dim=16), Layout(4, 2, 4, q_heads=12, kv_heads=3, head_dim=16), windows):
        world = World(layout, backend(), torch.float32)
        world.add("0", [1] * 61, 4)
        world.add("1", [2] * 20, 4)
        world.run()
        assert world.worst_error < 1e-5


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_cache_is_read_as_it_was_written_whatever_travels(schedule, cache_dtype):
    """Dense attention over the quantised keys and values: chunks, pages, ranks and prefix hits change nothing."""
    for grid in [(1, 1, 1), (1, 3, 1), (2, 2, 2)]:
        world = World(Layout(*grid, 4, 2, budget=19, schedule=schedule, cache_dtype=cache_dtype))
        world.add("0", [1] * 53, 4)
        world.run()
        world.add("1", [1] * 40, 3)  # begins with cached pages
        world.run()
        assert_exact(world)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_cpu_backend_reads_a_quantised_cache_as_the_reference_does(cache_dtype):
    for grid, windows in [((1, 1, 1), (None,)), ((2, 2, 2), (None, 9))]:
        layout = Layout(*grid, 4, 2, budget=40, windows=windows, cache_dtype=cache_dtype)
        world = World(layout, CpuBackend(), torch.float32)
        for request in range(6):  # enough short ones for a batch
            world.add(str(request), [1 + request] * (20 + request), 4)
        world.run()
        assert world.worst_error < 1e-5


@pytest.mark.parametrize("method", ["causal", "unmasked"])
def test_the_cpu_backend_takes_rows_of_any_strides(method):
    """The kernel reads the last dimension as adjacent, unchecked; a transposed product's is not."""
    torch.manual_seed(0)
    adjacent = [torch.randn(4, heads, 16) for heads in (6, 2, 2)]
    strided = [x.flatten(1).t().contiguous().t().unflatten(1, x.shape[1:]) for x in adjacent]
    pool, runs, blocks = torch.randn(2, 2, 32, 16), (QueryRun(0, 4, (Span(3, 9),)),), (HeadBlock(0, 6, 0, 2),)

    def attend(q, k, v):
        backend = CpuBackend()
        if method == "causal":
            return backend.causal(q, k, v, blocks, 0.25)
        return backend.attend(q, runs, CacheRows(pool), blocks, 0.25)

    expected, found = attend(*adjacent), attend(*strided)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)


@pytest.mark.parametrize("method", ["causal", "unmasked"])
def test_states_of_bf16_rows_are_fp32_with_a_natural_lse(method):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 16).bfloat16() for heads in (2, 1, 1))
    pool = torch.stack([k, v]).transpose(1, 2).contiguous()
    runs, blocks = (QueryRun(0, 1, (Span(0, 1),)),), (HeadBlock(0, 2, 0, 1),)
    backend = CpuBackend()
    part = (
        backend.causal(q, k, v, blocks, 1.0)
        if method == "causal"
        else backend.attend(q, runs, CacheRows(pool), blocks, 1.0)
    )
    assert part.out.dtype == part.lse.dtype == torch.float32
    score = (q.float() * k.float()).sum(-1)
    torch.testing.assert_close(part.lse, score, atol=1e-3, rtol=0)  # one key: the lse is its score, whatever the base


def test_many_short_contexts_are_attended_together_as_they_are_alone():
    """Lone queries over scattered spans of unlike lengths, NaN everywhere else: the batch against the reference."""
    generator = torch.Generator().manual_seed(5)
    kv = torch.full((2, 3, 4000, 8), float("nan"))
    runs: list[QueryRun] = []
    for row, tokens in enumerate((1, 700, 40, 41, 90, 33, 300, 5, 47, 44)):
        cut = tokens // 3
        spans = tuple(Span(row * 400 + at, n) for at, n in ((0, cut), (390 - (tokens - cut), tokens - cut)) if n > 0)
        spans = (Span(row * 400, tokens),) if tokens > 380 else spans
        for span in spans:
            kv[:, :, span.slot : span.slot + span.length] = torch.randn(2, 3, span.length, 8, generator=generator)
        runs.append(QueryRun(row, 1, spans))
    q = torch.randn(len(runs), 12, 8, generator=generator)
    blocks = (HeadBlock(0, 8, 0, 2), HeadBlock(8, 12, 2, 3))
    together, alone = batches(tuple(runs))
    assert sum(len(batch.rows) for batch in together) == 4
    assert {run.row for run in alone} >= {1}
    part = CpuBackend().attend(q, runs, CacheRows(kv), blocks, 0.3)
    expected = ReferenceBackend().attend(q, runs, CacheRows(kv), blocks, 0.3)
    torch.testing.assert_close(part.out, expected.out.to(part.out.dtype), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part.lse, expected.lse.to(part.lse.dtype), atol=1e-5, rtol=1e-4)
