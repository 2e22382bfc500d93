"""A step planned while the one before it runs: the same tokens, of which the ranks learn first."""

from __future__ import annotations

import pytest

from longspan import SamplingParams
from tests.oracle import greedy, oracle, prompt_of
from tests.pairs import in_turn

PROMPTS = [prompt_of(61), prompt_of(5, 3), prompt_of(33, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LAYOUTS = [{}, {"pcp": 3}, {"tp": 2}, {"tp": 4, "dcp": 2}, {"tp": 2, "pcp": 2, "dcp": 2}]


def tokens_of(llm, params=GREEDY, prompts=PROMPTS):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def watch_plans(llm):
    """Every plan that is handed out from now on."""
    plans, submit = [], llm.engine.executor.submit
    llm.engine.executor.submit = lambda plan: (plans.append(plan), submit(plan))
    return plans


@pytest.mark.parametrize(("model", "layout"), in_turn(["llama", "deepseek-v3", "gpt-oss"], LAYOUTS, each=2), ids=str)
def test_tokens_are_those_of_the_oracle(tiny, model, layout):
    llm = tiny(model, async_scheduling=True, **layout)
    plans = watch_plans(llm)
    assert tokens_of(llm) == [greedy(oracle(model), prompt, 24)[0] for prompt in PROMPTS]
    assert any(segment.pending for plan in plans for segment in plan.segments)
    llm.engine.scheduler.check_integrity()


def test_sampled_tokens_are_those_without(tiny):
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=24)
    assert tokens_of(tiny(async_scheduling=True, tp=2, dcp=2), params) == tokens_of(tiny(), params)


@pytest.mark.parametrize(
    ("layout", "ahead"),
    [({}, True), ({"tp": 2}, True), ({"pages_per_shard": (24,)}, True), ({"pcp": 2}, False)],
    ids=str,
)
def test_penalties_run_ahead_where_one_rank_samples_all_tokens_of_a_request(tiny, layout, ahead):
    """Ranks count the tokens that they sample; on several pcp indices each would count its own only."""
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.3, max_tokens=30)
    llm = tiny(async_scheduling=True, **layout)
    plans = watch_plans(llm)
    assert tokens_of(llm, params) == tokens_of(tiny(), params)
    assert any(segment.pending for plan in plans for segment in plan.segments) == ahead
    assert "pages_per_shard" not in layout or llm.engine.stats().scheduler.preemptions > 0


def test_scores_of_prompts_do_not_keep_their_requests_from_running_ahead(tiny):
    llm = tiny(async_scheduling=True)
    plans = watch_plans(llm)
    scored, plain = (
        some.generate(PROMPTS, SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=8)) for some in (llm, tiny())
    )
    assert [one.prompt_logprobs for one in scored] == [one.prompt_logprobs for one in plain]
    assert any(segment.pending for plan in plans for segment in plan.segments)


def test_prompt_log_probabilities_look_back_at_the_prompt_alone_and_run_ahead(tiny):
    params = SamplingParams(temperature=0, prompt_logprobs=2, logprobs=1, max_tokens=12)
    ahead = tiny(async_scheduling=True, pcp=2)
    plans = watch_plans(ahead)
    for found, expected in zip(ahead.generate(PROMPTS, params), tiny(pcp=2).generate(PROMPTS, params), strict=True):
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        assert found.prompt_logprobs == expected.prompt_logprobs
    assert any(segment.pending for plan in plans for segment in plan.segments)


def test_what_was_computed_behind_an_end_is_dropped(tiny):
    """The stop token is known a step late: nothing of that step is delivered, and its pages are free."""
    llm = tiny(async_scheduling=True, pcp=2)
    expected = greedy(oracle("llama"), PROMPTS[0], 24)[0]
    stop = expected[7]
    cut = expected.index(stop) + 1
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(stop,))
    assert tokens_of(llm, params, [PROMPTS[0]]) == [expected[:cut]]
    assert tokens_of(llm, GREEDY, [PROMPTS[1]]) == [greedy(oracle("llama"), PROMPTS[1], 24)[0]]
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check_integrity()


def test_an_id_may_be_used_again_while_a_step_of_the_request_that_had_it_is_under_way(tiny):
    engine = tiny(async_scheduling=True).engine
    engine.add_request("again", PROMPTS[0], GREEDY)
    for _ in range(4):
        engine.step()
    assert engine.core.steps_in_flight
    engine.abort("again")
    engine.add_request("again", PROMPTS[1], GREEDY)
    outputs = [output for _ in range(60) if engine.has_unfinished for output in engine.step()]
    assert outputs[-1].outputs[0].token_ids == greedy(oracle("llama"), PROMPTS[1], 24)[0]
    engine.scheduler.check_integrity()


def test_no_step_is_computed_for_tokens_beyond_the_last(tiny):
    llm = tiny(async_scheduling=True)
    plans = watch_plans(llm)
    assert len(tokens_of(llm, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), [PROMPTS[1]])[0]) == 5
    assert sum(segment.sample for plan in plans for segment in plan.segments) == 5


def test_preempted_requests_give_the_same_tokens(tiny):
    """Pages for little more than one of them: a request is preempted while its token is under way."""
    llm = tiny(async_scheduling=True, pages_per_shard=(24,))
    assert tokens_of(llm, SamplingParams(temperature=0, max_tokens=30)) == [
        greedy(oracle("llama"), prompt, 30)[0] for prompt in PROMPTS
    ]
    assert llm.engine.stats().scheduler.preemptions > 0


@pytest.mark.parametrize("options", [{"pp": 2}, {"speculative": "prompt-lookup:3"}], ids=str)
def test_stages_and_drafts_do_not_run_ahead(tiny, options):
    llm = tiny(async_scheduling=True, **options)
    plans = watch_plans(llm)
    assert tokens_of(llm) == [greedy(oracle("llama"), prompt, 24)[0] for prompt in PROMPTS]
    assert not any(segment.pending for plan in plans for segment in plan.segments)


@pytest.mark.parametrize("options", [{"pcp": 2}, {"pp": 2}], ids=str)
def test_with_drafts_the_next_step_is_computed_while_the_caller_has_the_outputs_of_the_last(tiny, options):
    """It waits for the tokens, and for nothing else: what a stop string or an abort ends meanwhile is dropped."""
    llm = tiny(async_scheduling=True, speculative="prompt-lookup:3", **options)
    engine, prompt = llm.engine, PROMPTS[1] * 3
    engine.add_request("a", prompt, GREEDY)
    engine.add_request("b", PROMPTS[0], GREEDY)
    flying, outputs = [], {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id] = output.outputs[0].token_ids
        flying.append(engine.core.steps_in_flight)
        if len(flying) == 6:
            engine.abort("b")
            engine.add_request("b", PROMPTS[2], GREEDY)
    assert outputs == {"a": greedy(oracle("llama"), prompt, 24)[0], "b": greedy(oracle("llama"), PROMPTS[2], 24)[0]}
    assert min(flying[:12]) >= 1
    assert llm.stats().scheduler.drafted_tokens > 0
    engine.scheduler.check_integrity()


def test_a_request_whose_tokens_are_read_is_computed_in_every_second_step_beside_others_that_run_ahead(tiny):
    """Three steps are in flight otherwise, and it would wait for two of them."""
    reading = SamplingParams(temperature=0, max_tokens=8, bad_word_ids=((1, 2, 3, 4),))
    llm = tiny(async_scheduling=True)
    plans = watch_plans(llm)
    tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:2], [GREEDY, reading])]
    assert tokens == [
        greedy(oracle("llama"), prompt, count)[0] for prompt, count in zip(PROMPTS, (24, 8), strict=False)
    ]
    decoded = {}
    for plan in plans:
        for segment in plan.segments:
            decoded.setdefault(segment.request_id, []).extend([plan.step] * (not segment.prefill))
    _, (first, *_, last) = sorted(decoded.values(), key=len, reverse=True)
    assert last - first == 2 * 6  # seven steps decode it


def test_three_steps_are_in_flight_where_no_token_is_waited_for(tiny):
    llm = tiny(async_scheduling=True)
    most, core = [], llm.engine.core
    collect = core.executor.collect
    core.executor.collect = lambda check: (most.append(core.steps_in_flight), collect(check))[1]
    tokens_of(llm)
    assert max(most) == 3
