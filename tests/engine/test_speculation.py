"""Drafted tokens change how many steps an output takes, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan import ConfigError, SamplingParams
from longspan.scheduler.lookup import PromptLookup
from tests.oracle import all_logprobs, greedy, oracle, prompt_of
from tests.traffic import schedules_that_moved

LOOP = prompt_of(7, 3) * 4  # what follows its end is likely to be drafted
PROMPTS = [LOOP, prompt_of(33), LOOP[3:] + prompt_of(5)]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


def tokens_of(llm, prompts, params):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def test_a_draft_is_what_followed_the_last_tokens_before():
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3, 9, 2, 3], 3) == [9, 2, 3]  # the latest, by two tokens
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3, 9, 2, 3, 7], 3) == []


def test_a_draft_may_overlap_the_tokens_it_follows():
    assert PromptLookup().draft([5, 5, 5, 5], 3) == [5]
    assert PromptLookup().draft([8, 5], 3) == []


def test_bytes_that_match_across_tokens_are_no_match():
    wide = [0x01000000, 0x02000000, 0x03000000, 7]
    shifted = [0x010000, 0x020000, 0x030000]  # the same bytes, one place on
    assert PromptLookup().draft([*wide, *shifted], 2) == []


@pytest.mark.parametrize(
    ("model", "layout", "page_size", "drafts"),
    [
        ("llama", {}, 1, 3),
        ("llama", {}, 16, 1),
        ("llama", {"pcp": 3}, 4, 8),
        ("llama", {"pcp": 3}, 1, 3),
        ("llama", {"tp": 4, "dcp": 2}, 4, 8),
        ("deepseek-v3", {"tp": 2, "pcp": 2, "dcp": 2}, 1, 3),
        ("deepseek-v3", {"tp": 2, "pcp": 2, "dcp": 2}, 16, 1),
        ("gpt-oss", {"tp": 2, "pcp": 2, "dcp": 2}, 4, 8),
    ],
)
def test_greedy_tokens_are_the_same_over_pages_and_shards(tiny, model, layout, page_size, drafts):
    llm = tiny(model, page_size=page_size, speculative=f"prompt-lookup:{drafts}", **layout)
    expected = [greedy(oracle(model), prompt, 40)[0] for prompt in PROMPTS]
    assert tokens_of(llm, PROMPTS, GREEDY) == expected
    llm.engine.scheduler.check_integrity()


def test_right_drafts_save_steps_and_wrong_ones_are_taken_back(tiny):
    llm = tiny(pcp=2, speculative="prompt-lookup:4")
    prompt = LOOP + greedy(oracle("llama"), LOOP, 30)[0] + LOOP  # it has said all of it before
    assert tokens_of(llm, [prompt, *PROMPTS], GREEDY) == [greedy(oracle("llama"), p, 40)[0] for p in (prompt, *PROMPTS)]
    counters = llm.stats().scheduler
    assert 0 < counters.accepted_tokens < counters.drafted_tokens
    drafts = counters.drafts
    assert (sum(drafts.drafted), sum(drafts.accepted)) == (counters.drafted_tokens, counters.accepted_tokens)
    assert list(drafts.accepted) == sorted(drafts.accepted, reverse=True)  # a right draft follows right ones only
    assert len(drafts.accepted) <= len(drafts.drafted) and drafts.accepted[0] < drafts.drafted[0]
    assert drafts.mean_length == 1 + counters.accepted_tokens / drafts.steps


def test_text_that_copies_keeps_all_drafts_and_random_text_falls_to_few(tiny):
    copying = LOOP + greedy(oracle("llama"), LOOP, 30)[0] + LOOP
    eight = tuple((token, 100.0) for token in range(8))  # pairs come again, and what follows differs
    random_text = SamplingParams(temperature=20, seed=1, max_tokens=100, logit_bias=eight)
    counts = []
    for prompt, params in ((copying, GREEDY), (LOOP, random_text)):
        llm = tiny(page_size=16, speculative="prompt-lookup:4")
        (output,) = tokens_of(llm, [prompt], params)
        assert [output] == tokens_of(tiny(page_size=16), [prompt], params)
        counts.append(llm.stats().scheduler.drafts)
    copied, random = counts
    assert copied.drafted[3] > 0.5 * copied.steps
    assert random.steps > 5 and sum(random.drafted) < 2 * random.steps


@pytest.mark.parametrize("schedule", ["ring_q", "tree_q", "gather_kv", "ring_kv"])
def test_drafts_travel_under_every_schedule(tiny, schedule):
    llm = tiny(tp=2, pcp=2, dcp=2, page_size=1, schedule=schedule, speculative="prompt-lookup:5", local_context=0)
    assert tokens_of(llm, PROMPTS, GREEDY) == [greedy(oracle("llama"), prompt, 40)[0] for prompt in PROMPTS]
    assert llm.stats().scheduler.drafted_tokens > 0
    assert schedules_that_moved(llm) == {schedule}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"temperature": 0.5, "seed": 1, "presence_penalty": 1.0, "top_k": 5},
    ],
    ids=["sampled", "penalised", "both"],
)
def test_sampled_and_penalised_tokens_are_those_without_drafts(tiny, fields):
    params = SamplingParams(max_tokens=60, **fields)
    plain = tokens_of(tiny(pcp=2), PROMPTS, params)
    llm = tiny(pcp=2, speculative="prompt-lookup:3")
    assert tokens_of(llm, PROMPTS, params) == plain
    assert llm.stats().scheduler.drafted_tokens > 0


def test_log_probabilities_belong_to_their_tokens(tiny):
    llm = tiny(pcp=2, speculative="prompt-lookup:4")
    (output,) = llm.generate([LOOP], replace(GREEDY, logprobs=97))
    expected, rows = greedy(oracle("llama"), LOOP, 40)
    assert output.outputs[0].token_ids == expected
    assert (all_logprobs(output.outputs[0]) - rows).abs().max() < 1e-3


def test_preempted_requests_give_the_same_tokens(tiny):
    llm = tiny(pcp=2, pages_per_shard=(13, 12), speculative="prompt-lookup:4")
    batch = [*PROMPTS, LOOP[1:], LOOP[2:]]
    assert tokens_of(llm, batch, GREEDY) == [greedy(oracle("llama"), prompt, 40)[0] for prompt in batch]
    assert llm.stats().scheduler.preemptions > 0
    llm.engine.scheduler.check_integrity()


def test_stages_verify_drafts_with_steps_under_way(tiny):
    llm = tiny("llama-deep", pp=3, pcp=2, pages_per_shard=(24, 24), speculative="prompt-lookup:4")
    batch = [*PROMPTS, LOOP[1:], LOOP[2:]]
    assert tokens_of(llm, batch, GREEDY) == [greedy(oracle("llama-deep"), prompt, 40)[0] for prompt in batch]


def test_a_stop_among_right_drafts_ends_the_output_there(tiny):
    llm = tiny(speculative="prompt-lookup:8")
    prompt = LOOP + greedy(oracle("llama"), LOOP, 30)[0] + LOOP
    whole = greedy(oracle("llama"), prompt, 30)[0]
    stop = whole[17]
    params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(stop,))
    assert tokens_of(llm, [prompt], params) == [whole[: whole.index(stop) + 1]]


def test_pages_of_the_prefix_cache_hold_right_tokens_only(tiny):
    llm = tiny(pcp=2, page_size=2, speculative="prompt-lookup:6")
    (first,) = tokens_of(llm, [LOOP], GREEDY)
    longer = LOOP + first
    for length in range(len(LOOP), len(longer), 5):
        assert tokens_of(llm, [longer[:length]], GREEDY) == [greedy(oracle("llama"), longer[:length], 40)[0]]


@pytest.mark.parametrize(
    "value", ["prompt-lookup", "prompt-lookup:0", "prompt-lookup:65", "eagle:3", "prompt-lookup:x"]
)
def test_an_unknown_kind_is_refused(tiny, value):
    with pytest.raises(ConfigError, match=r"prompt-lookup|prompt_lookup"):
        tiny(speculative=value)
