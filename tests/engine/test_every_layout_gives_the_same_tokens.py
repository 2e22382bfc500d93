"""Greedy tokens of every layout, page size, chunk size, schedule and prefix hit are transformers'."""

from functools import cache

import pytest

from longspan import SamplingParams
from tests.oracle import LOGPROBS, all_logprobs, greedy, oracle, oracle_in_bfloat16, prompt_of
from tests.pairs import in_turn
from tests.traffic import TRAVELLING, schedules_that_moved

TOKENS = 7  # enough to cross a page's end from prompts of 3, 16 and 100
LENGTHS = (1, 3, 16, 33, 100)  # shorter than the ranks, than a page; at and beyond page and chunk boundaries
SIZES = (1, 2, 3, 4, 8)
GRIDS = [
    (tp, pcp, dcp) for tp in SIZES for pcp in SIZES for dcp in range(1, tp + 1) if tp % dcp == 0 and tp * pcp <= 8
] + [(3, 4, 3), (8, 2, 4), (6, 2, 3)]

FEWER = {
    "deepseek-v3": GRIDS[::3],
    "llama-multi-head": GRIDS[1::10],
    "llama-multi-query": GRIDS[2::10],
    "gpt-oss": GRIDS[1::4],
    "glm4-moe": GRIDS[5::15],
}
MODELS_ON_GRIDS = [("llama", grid) for grid in GRIDS] + [(model, grid) for model in FEWER for grid in FEWER[model]]


def name(grid):
    return "tp{} pcp{} dcp{}".format(*grid)


@cache
def expected(model: str, lengths=LENGTHS) -> list[list[int]]:
    return [greedy(oracle(model), prompt_of(length), TOKENS)[0] for length in lengths]


def tokens_of(llm, prompts, max_tokens=TOKENS) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    return [output.outputs[0].token_ids for output in outputs]


def prompts():
    return [prompt_of(length) for length in LENGTHS]


@pytest.mark.parametrize(("model", "grid"), MODELS_ON_GRIDS, ids=str)
def test_any_grid(tiny, grid, model):
    tp, pcp, dcp = grid
    # by themselves threads choose to read keys in place: on every grid something travels too
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, schedule="gather_q" if model == "llama" else "auto")
    assert tokens_of(llm, prompts()) == expected(model)


@pytest.mark.parametrize("schedule", ["gather_q", "gather_kv"])
@pytest.mark.parametrize(("page_size", "budget"), [(1, 19), (16, 8), (64, 64)])
def test_windows_at_any_page_and_chunk_size(tiny, page_size, budget, schedule):
    llm = tiny("gpt-oss", tp=2, pcp=3, dcp=2, page_size=page_size, max_num_batched_tokens=budget, schedule=schedule)
    assert tokens_of(llm, prompts()) == expected("gpt-oss")
    assert schedules_that_moved(llm) == {schedule}


@pytest.mark.parametrize("schedule", ["gather_q", "gather_kv"])
@pytest.mark.parametrize(("page_size", "budget"), [(1, 19), (16, 8), (64, 64)])
def test_latents_travel_like_keys(tiny, page_size, budget, schedule):
    llm = tiny("deepseek-v3", tp=2, pcp=3, dcp=2, page_size=page_size, max_num_batched_tokens=budget, schedule=schedule)
    assert tokens_of(llm, prompts()) == expected("deepseek-v3")
    assert schedules_that_moved(llm) == {schedule}


@pytest.mark.parametrize(
    ("page_size", "budget", "schedule"),
    [
        (page_size, budget, ("gather_q", "gather_kv")[(row + column) % 2])
        for row, page_size in enumerate((1, 3, 16, 64))
        for column, budget in enumerate((8, 19, 64, 256))
    ],
)
def test_any_page_size_chunk_size_and_schedule(tiny, page_size, budget, schedule):
    llm = tiny(tp=2, pcp=3, dcp=2, page_size=page_size, max_num_batched_tokens=budget, schedule=schedule)
    assert tokens_of(llm, prompts()) == expected("llama")
    assert schedules_that_moved(llm) == {schedule}


@pytest.mark.parametrize(("model", "schedule"), in_turn(["llama", "deepseek-v3", "gpt-oss"], TRAVELLING, each=2))
def test_any_schedule_as_threads(tiny, model, schedule):
    llm = tiny(model, tp=2, pcp=3, dcp=2, schedule=schedule, ranks_per_node=2)
    assert tokens_of(llm, prompts()) == expected(model)
    assert schedules_that_moved(llm) == {schedule}


@pytest.mark.parametrize("schedule", ["ring_q", "tree_q"])
def test_rings_and_trees_as_processes(tiny, schedule):
    llm = tiny("deepseek-v3", pcp=3, schedule=schedule, ranks_per_node=2, executor="processes")
    assert tokens_of(llm, prompts()) == expected("deepseek-v3")
    assert schedules_that_moved(llm) == {schedule}


def test_the_measured_choice_gives_the_same_tokens(tiny):
    llm = tiny(pcp=2, cost=None)
    assert tokens_of(llm, prompts()) == expected("llama")
    assert llm.engine.core.constants == llm.engine.executor.constants
    assert "calibration" not in llm.stats().traffic.bytes_by_label


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pcp": 2, "schedule": "gather_kv", "local_context": 0}], ids=str)
def test_requests_that_share_a_beginning_see_their_own_continuation(tiny, layout):
    llm = tiny("deepseek-v3", max_num_batched_tokens=400, max_num_seqs=32, **layout)
    shared = prompt_of(8)
    turns = [shared + prompt_of(12, seed) for seed in range(1, 21)]
    llm.generate(turns, SamplingParams(temperature=0, max_tokens=1))
    longer = [turn + prompt_of(20 if seed < 3 else 1, 50 + seed) for seed, turn in enumerate(turns)]
    outputs = llm.generate(longer, SamplingParams(temperature=0, max_tokens=5))
    assert all(output.num_cached_tokens >= 16 for output in outputs)
    assert [o.outputs[0].token_ids for o in outputs] == [greedy(oracle("deepseek-v3"), p, 5)[0] for p in longer]


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        ("llama", (1, 3, 1, 1)),
        ("llama-deep", (1, 2, 1, 2)),
        ("deepseek-v3", (2, 2, 2, 1)),
        ("gpt-oss", (2, 3, 2, 1)),
    ],
)
def test_prefix_hits_of_every_length(tiny, grid, model):
    tp, pcp, dcp, pp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, pp=pp)
    whole = prompt_of(33)
    llm.generate(whole, SamplingParams(temperature=0, max_tokens=1))
    for shared in range(34):
        prompt = whole[:shared] + prompt_of(34, seed=1)[shared:]
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4))
        assert output.num_cached_tokens == shared // 4 * 4
        assert output.outputs[0].token_ids == greedy(oracle(model), prompt, 4)[0]


def test_a_hit_that_covers_the_whole_prompt_still_computes_a_token(tiny):
    llm = tiny(pcp=2)
    first, second = (tokens_of(llm, [prompt_of(16)]) for _ in range(2))
    assert first == second == [greedy(oracle("llama"), prompt_of(16), TOKENS)[0]]


def test_preempted_requests_give_the_same_tokens(tiny):
    llm = tiny(pcp=2, pages_per_shard=(10, 8))
    batch = [prompt_of(16, seed) for seed in range(4)]
    assert tokens_of(llm, batch, 30) == [greedy(oracle("llama"), prompt, 30)[0] for prompt in batch]
    assert llm.stats().scheduler.preemptions > 0


def test_shards_of_unequal_size_give_the_same_tokens(tiny):
    llm = tiny(pcp=3, pages_per_shard=(40, 3, 11))
    assert tokens_of(llm, prompts()) == expected("llama")


def test_capacity_grows_exactly_with_the_context_ranks(tiny):
    for page_size in (1, 7, 16):
        for pcp, tp, dcp in ((2, 1, 1), (3, 1, 1), (2, 4, 1)):
            kv_heads_a_rank = tiny(tp=tp, page_size=page_size).stats().capacity_tokens
            assert tiny(pcp=pcp, tp=tp, dcp=dcp, page_size=page_size).stats().capacity_tokens == pcp * kv_heads_a_rank
        assert tiny("llama-multi-query", tp=4, dcp=4, page_size=page_size).stats().capacity_tokens == 4 * (
            tiny("llama-multi-query", page_size=page_size).stats().capacity_tokens
        )


def test_a_prompt_shorter_than_local_context_moves_nothing(tiny):
    llm = tiny(pcp=4, local_context=64)
    tokens_of(llm, [prompt_of(16)])
    assert not schedules_that_moved(llm)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 4, 1), (8, 1, 1), (4, 1, 4), (2, 2, 2), (2, 3, 2)], ids=name)
def test_bfloat16_is_as_near_to_fp32_on_any_grid_as_transformers_is(tiny, grid):
    tp, pcp, dcp = grid
    prompt = prompt_of(100)
    exact = greedy(oracle("llama"), prompt, 1)[1]
    usual = (greedy(oracle_in_bfloat16("llama"), prompt, 1)[1] - exact).abs()
    llm = tiny(tp=tp, pcp=pcp, dcp=dcp, dtype="bfloat16")
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, logprobs=LOGPROBS))
    error = (all_logprobs(output.outputs[0]) - exact).abs()
    assert 0 < error.mean() < 1.25 * usual.mean()
    assert error.max() < 1.25 * usual.max()


@pytest.mark.parametrize("grid", [(1, 8, 1), (8, 1, 8), (2, 3, 2)], ids=name)
def test_a_prompt_shorter_than_the_ranks_may_be_spread_all_the_same(tiny, grid):
    tp, pcp, dcp = grid
    llm = tiny("llama-multi-query", tp=tp, pcp=pcp, dcp=dcp, page_size=1, local_context=0)
    assert tokens_of(llm, prompts()) == expected("llama-multi-query")
