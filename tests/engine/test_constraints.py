"""Tokens that a request forbids: never sampled, and all others as before, however the request is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch

from longspan import FinishReason, RequestError, SamplingParams
from longspan.engine.rank.sampling.constraints import Constraint
from longspan.engine.rank.sampling.grammar import Vocabulary
from tests.oracle import VOCAB, greedy, oracle, prompt_of

LOOP = prompt_of(7, 3) * 4  # what follows its end is likely to be drafted
PROMPTS = [LOOP, prompt_of(33), prompt_of(14)]
COUNT = 18


@torch.inference_mode()
def greedy_without(prompt: list[int], banned: Callable[[list[int]], Iterable[int]]) -> list[int]:
    """The most likely tokens according to transformers, none of them `banned` after the output so far."""
    output: list[int] = []
    for _ in range(COUNT):
        logits = oracle("llama")(torch.tensor([[*prompt, *output]])).logits[0, -1]
        logits[list(banned(output))] = -torch.inf
        output.append(int(logits.argmax()))
    return output


@cache
def constrained() -> tuple[SamplingParams, list[list[int]]]:
    """Parameters that forbid what the model would say, in each of the three ways, and what it says instead."""
    allowed = list(range(0, VOCAB, 12))  # few, so that they repeat and drafts of them prove right
    said = [greedy_without(prompt, lambda output: set(range(VOCAB)) - set(allowed)) for prompt in PROMPTS]
    words = [*(tuple(tokens[3:5]) for tokens in said), (said[1][8],), tuple(said[0][10:13])]
    stop = said[2][1]

    def banned(output: list[int]) -> set[int]:
        ends = {word[-1] for word in words if tuple(output[len(output) - len(word) + 1 :]) == word[:-1]}
        early = {stop} if len(output) < 12 else set()
        return {*ends, *early, *(token for token in range(VOCAB) if token not in allowed)}

    params = SamplingParams(
        temperature=0, max_tokens=COUNT, stop_token_ids=(stop,), min_tokens=12, allowed_token_ids=allowed,
        bad_word_ids=words,
    )  # fmt: skip
    outputs = [greedy_without(prompt, banned) for prompt in PROMPTS]
    ends = [next((n for n, token in enumerate(output, 1) if token == stop), COUNT) for output in outputs]
    assert outputs != said
    return params, [output[:end] for output, end in zip(outputs, ends, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"pcp": 3}, {"tp": 4, "dcp": 2}, {"pp": 2, "pcp": 2}, {"speculative": "prompt-lookup:4", "pcp": 2},
        {"async_scheduling": True}, {"pages_per_shard": (16,)},
    ],
    ids=str,
)  # fmt: skip
def test_constrained_tokens_are_those_of_transformers_under_the_same_rules(tiny, options):
    params, expected = constrained()
    llm = tiny(**options)
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)] == expected
    counters = llm.stats().scheduler
    assert "pages_per_shard" not in options or counters.preemptions > 0
    assert "speculative" not in options or counters.accepted_tokens > 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_allowed_tokens_are_sampled_and_no_others(tiny, temperature):
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=40, allowed_token_ids=[3, 50, 96])
    assert set(tiny(tp=2).generate(prompt_of(9), params)[0].outputs[0].token_ids) <= {3, 50, 96}


def test_a_bad_word_of_one_token_needs_no_history_and_runs_ahead(tiny):
    expected = greedy(oracle("llama"), prompt_of(5), 8)[0]
    params = SamplingParams(temperature=0, max_tokens=8, bad_word_ids=[expected[:1]])
    assert not params.needs_history
    found = tiny(async_scheduling=True).generate(prompt_of(5), params)[0].outputs[0].token_ids
    assert expected[0] not in found


def test_no_stop_token_comes_before_min_tokens_and_the_first_after_them_ends_the_output(tiny):
    stop = greedy(oracle("llama"), prompt_of(5), 8)[0][2]
    params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(stop,), allowed_token_ids=(stop, 7))
    llm = tiny()
    free, held = (llm.generate(prompt_of(5), replace(params, min_tokens=count))[0].outputs[0] for count in (0, 9))
    assert free.token_ids.count(stop) == 1 and len(free.token_ids) < 9
    assert held.token_ids[:9] == [7] * 9
    assert held.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_the_models_own_end_is_held_back_too():
    vocabulary = Vocabulary(lambda: None, VOCAB, (96,))
    constraint = Constraint(
        SamplingParams(min_tokens=2, max_tokens=4, stop_token_ids=(5,), ignore_eos=True), vocabulary
    )
    assert [constraint.masks(position, ()) for position in (0, 1, 2)] == [(None, [5, 96])] * 2 + [(None, [])]


def test_a_request_that_forbids_every_token_fails_alone(tiny):
    llm = tiny()
    params = SamplingParams(max_tokens=4, temperature=0, allowed_token_ids=[1], bad_word_ids=[[1, 1]])
    none, fine = llm.generate([prompt_of(5)] * 2, [params, SamplingParams(max_tokens=4, temperature=0)])
    assert none.outputs[0].finish_reason is FinishReason.ERROR
    assert "allowed_token_ids=[...]: leave no token for output position 1" in str(none.outputs[0].stop_reason)
    assert fine.outputs[0].token_ids == greedy(oracle("llama"), prompt_of(5), 4)[0]


def test_a_request_that_has_failed_does_not_end_the_steps_that_were_planned_for_it(tiny):
    """Its second token is planned before its first fails, and its penalties would need the first."""
    llm = tiny(async_scheduling=True)
    params = SamplingParams(
        max_tokens=6, temperature=0, allowed_token_ids=[1], stop_token_ids=(1,), min_tokens=1, repetition_penalty=1.5
    )
    none, fine = llm.generate([prompt_of(5)] * 2, [params, SamplingParams(max_tokens=4, temperature=0)])
    assert "leave no token for output position 0" in str(none.outputs[0].stop_reason)
    assert fine.outputs[0].token_ids == greedy(oracle("llama"), prompt_of(5), 4)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": [97]}, "allowed_token_ids=97: is not in 0..96"),
        ({"bad_word_ids": [[1, 97]]}, "bad_word_ids=97: is not in 0..96"),
        ({"bad_words": ["x"]}, "bad_words=.*: are text and this model has no tokenizer; give bad_word_ids"),
        ({"priority": 1}, "priority=1: counts for nothing under scheduling_policy=fcfs; use .*--scheduling-policy"),
    ],
)
def test_a_constraint_that_cannot_be_is_refused_before_anything_is_computed(tiny, fields, message):
    with pytest.raises(RequestError, match=message):
        tiny(executor="dry").generate(prompt_of(5), SamplingParams(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": -1}, r"min_tokens=-1: must be in 0\.\.2\^31-1"),
        ({"min_tokens": 10**30, "max_tokens": None}, r"min_tokens=10*: must be in 0\.\."),
        ({"priority": 10**30}, r"priority=10*: must be in "),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5: exceeds max_tokens=4"),
        ({"allowed_token_ids": []}, r"allowed_token_ids=\[\]: allows no token"),
        ({"bad_words": [" "]}, "bad_words=.*: must not hold an empty string"),
        ({"bad_word_ids": [[]]}, "bad_word_ids=.*: must not hold an empty list"),
    ],
)
def test_parameters_that_no_model_could_follow_are_refused_when_they_are_made(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)
