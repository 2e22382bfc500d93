"""Layers split over stages, experts over ranks: the same tokens, fewer bytes a rank."""

import pytest

from longspan import SamplingParams
from longspan.engine.setup import EngineSetup
from longspan.errors import ConfigError
from longspan.parallel.experts import GatheredExperts
from tests.engine.test_every_layout_gives_the_same_tokens import GRIDS, TOKENS, expected, prompts, tokens_of
from tests.oracle import greedy, oracle, prompt_of
from tests.traffic import schedules_that_moved

STAGES = [(pp, *grid) for pp in (2, 3, 4) for grid in GRIDS if max(grid) <= 4 and pp * grid[0] * grid[1] <= 8]
LARGE = [(4, 4, 1, 2), (2, 4, 2, 2), (3, 2, 2, 2), (4, 1, 3, 1)]
MODELS = ["mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3"]  # with experts
MIXED = [(1, 2, 1), (2, 2, 1), (3, 2, 3), (1, 4, 1), (2, 3, 2), (4, 2, 2)]


def name(grid):
    return "pp{} tp{} pcp{} dcp{}".format(*grid)


@pytest.mark.parametrize("grid", STAGES[::2], ids=name)
def test_any_number_of_stages(tiny, grid):
    pp, tp, pcp, dcp = grid
    llm = tiny("llama-deep", pp=pp, tp=tp, pcp=pcp, dcp=dcp)
    assert tokens_of(llm, prompts()) == expected("llama-deep")


@pytest.mark.parametrize("grid", [*STAGES[1::4], *LARGE], ids=name)
def test_any_number_of_stages_with_latents_and_experts(tiny, grid):
    pp, tp, pcp, dcp = grid
    llm = tiny("deepseek-v3-deep", pp=pp, tp=tp, pcp=pcp, dcp=dcp)
    assert tokens_of(llm, prompts()) == expected("deepseek-v3-deep")


def test_stages_as_processes(tiny):
    llm = tiny("llama-deep", pp=2, executor="processes")
    assert tokens_of(llm, prompts()) == expected("llama-deep")
    assert llm.stats().traffic.bytes_by_label["pipeline"] > 0


@pytest.mark.parametrize(("page_size", "budget"), [(1, 9), (16, 19), (8, 256)])
@pytest.mark.parametrize("schedule", ["gather_q", "gather_kv"])
def test_any_page_size_and_chunk_size_over_stages(tiny, page_size, budget, schedule):
    llm = tiny("llama-deep", pp=3, pcp=2, page_size=page_size, max_num_batched_tokens=budget, schedule=schedule)
    assert tokens_of(llm, prompts()) == expected("llama-deep")
    assert schedules_that_moved(llm) == {schedule}


def test_every_stage_has_a_step_to_work_on(tiny):
    llm = tiny("llama-deep", pp=4)
    for number in range(8):
        llm.engine.add_request(str(number), prompt_of(20, number), SamplingParams(temperature=0, max_tokens=30))
    in_flight = []
    while llm.engine.has_unfinished:
        llm.engine.step()
        in_flight.append(llm.engine.core.steps_in_flight)
    assert max(in_flight) == 3  # one was just finished
    busiest = in_flight[len(in_flight) // 4 : len(in_flight) // 2]
    assert min(busiest) == 3


def test_preempted_requests_give_the_same_tokens_over_stages(tiny):
    llm = tiny("llama-deep", pp=3, pcp=2, pages_per_shard=(10, 8), max_num_seqs=4)
    batch = [prompt_of(16, seed) for seed in range(5)]
    assert tokens_of(llm, batch, 30) == [greedy(oracle("llama-deep"), prompt, 30)[0] for prompt in batch]
    assert llm.stats().scheduler.preemptions > 0
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(4))
def test_aborts_while_steps_are_under_way_leave_the_others_alone(tiny, seed):
    llm = tiny("llama-deep", pp=4, pcp=2, pages_per_shard=(14, 12))
    params = SamplingParams(temperature=0, max_tokens=12)
    for number in range(9):
        llm.engine.add_request(str(number), prompt_of(11 + 5 * number, seed), params)
    finished = {}
    for step in range(400):
        if step in (2, 5, 9):
            llm.engine.abort(str((step * 7 + seed) % 9))
        for output in llm.engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                finished[output.request_id] = output.outputs[0].token_ids
        llm.engine.scheduler.check_integrity()
        if not llm.engine.has_unfinished:
            break
    assert not llm.engine.has_unfinished
    assert len(finished) >= 6
    for number, tokens in finished.items():
        assert tokens == greedy(oracle("llama-deep"), prompt_of(11 + 5 * int(number), seed), 12)[0]


def test_capacity_grows_with_the_stages(tiny):
    alone = tiny("llama-deep").stats().capacity_tokens
    assert tiny("llama-deep", pp=2).stats().capacity_tokens == 2 * alone
    assert tiny("llama-deep", pp=4).stats().capacity_tokens == 4 * alone


def test_a_stage_holds_its_own_layers_and_no_others(tiny):
    llm = tiny("llama-deep", pp=3)
    assert [
        sorted(runner._attention.pool.layers) for runner in llm.engine.executor.runners
    ] == [[0], [1], [2, 3]]  # fmt: skip


def test_hidden_states_travel_once_between_neighbours(tiny):
    llm = tiny("llama-deep", pp=3, debug=False)
    tokens_of(llm, [prompt_of(20)], max_tokens=1)
    assert llm.stats().traffic.bytes_by_label["pipeline"] == 2 * 20 * llm.engine.setup.model.hidden_size * 4


def test_more_stages_than_layers_is_refused(tiny):
    with pytest.raises(ConfigError, match="pipeline_parallel_size=3: exceeds the model's 2 layers; use at most 2"):
        tiny(pp=3)


@pytest.mark.parametrize(("grid", "model"), [(grid, MODELS[(row + 1) % 4]) for row, grid in enumerate(MIXED)], ids=str)
def test_experts_over_all_ranks_of_a_stage_give_the_same_tokens(tiny, grid, model):
    tp, pcp, dcp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, enable_expert_parallel=True)
    assert tokens_of(llm, prompts()) == expected(model)


GATHERED = [(grid, MODELS[row % 4]) for row, grid in enumerate(MIXED)][1::2]


@pytest.fixture
def gathers_rows(monkeypatch):
    """As on GPUs of one machine: every rank gets the rows of all."""
    monkeypatch.setattr(EngineSetup, "gathers_rows", True)


@pytest.mark.parametrize(("grid", "model"), GATHERED, ids=str)
def test_experts_that_get_the_rows_of_all_ranks_give_the_same_tokens(tiny, gathers_rows, grid, model):
    """Prompts of several lengths: the ranks of a step have unequal numbers of rows, some of them none."""
    tp, pcp, dcp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, enable_expert_parallel=True)
    assert tokens_of(llm, prompts()) == expected(model)
    assert all(isinstance(runner._experts, GatheredExperts) for runner in llm.engine.executor.runners)


def test_experts_that_get_the_rows_of_all_ranks_over_stages(tiny, gathers_rows):
    llm = tiny("deepseek-v3-deep", pp=2, tp=2, pcp=2, dcp=2, enable_expert_parallel=True)
    assert tokens_of(llm, prompts(), TOKENS) == expected("deepseek-v3-deep")


def test_experts_over_ranks_and_stages(tiny):
    llm = tiny("deepseek-v3-deep", pp=2, tp=2, pcp=2, dcp=2, enable_expert_parallel=True)
    assert tokens_of(llm, prompts(), TOKENS) == expected("deepseek-v3-deep")


def test_each_expert_is_held_once(tiny):
    for parallel, copies in ((True, 1), (False, 3)):
        llm = tiny("mixtral", tp=2, pcp=3, enable_expert_parallel=parallel)
        parts = [runner._model._layers[0]._mlp.experts for runner in llm.engine.executor.runners]
        held = [expert for part in parts for expert in range(part.first, part.first + len(part))]
        assert sorted(held) == sorted(list(range(5)) * copies)


def test_a_row_travels_to_a_rank_once_however_many_of_its_experts_it_chose(tiny):
    llm = tiny("mixtral", pcp=2, enable_expert_parallel=True, debug=False, local_context=64)
    tokens_of(llm, [prompt_of(16)], max_tokens=1)
    model = llm.engine.setup.model
    count, chosen = 8, 2
    a_row = 2 * model.hidden_size * 4 + chosen * (8 + 4)  # out and back, ids and weights
    sizes = 2 * count * model.num_layers  # each rank says how many rows it sends
    sent = llm.stats().traffic.bytes_by_label["experts"] - sizes
    assert sent % a_row == 0
    assert 0 < sent // a_row <= 16 * model.num_layers


def test_experts_of_a_model_without_any_are_refused(tiny):
    with pytest.raises(ConfigError, match="enable_expert_parallel=True"):
        tiny(enable_expert_parallel=True)
