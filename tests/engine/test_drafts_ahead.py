"""Drafts are verified before the driver knows them, and where they begin: nothing differs from steps that wait.

How outputs end, are aborted and give way meanwhile is in test_drafts_that_are_cut_short.py.
"""

from __future__ import annotations

import pytest
import torch

from longspan import SamplingParams
from longspan.attention.backends import BACKENDS
from longspan.attention.backends.base import BackendShape
from longspan.scheduler.draft_length import DraftLength
from tests.drafting import folder_with_module, predictable_folder
from tests.engine.drafted import PROMPTS, drafts_in, named, plain_tokens, start, tokens_of
from tests.engine.test_recorded_drafts import mixed, mixed_without_drafts, poison, record, replays_in, speculative
from tests.oracle import prompt_of

AHEAD = {"attention_backend": "torch", "async_scheduling": True}


def watch_steps(llm):
    """(event, plan) of every step that is submitted, and of every result that is read, from now on."""
    events, executor = [], llm.engine.executor
    submit, collect = executor.submit, executor.collect
    executor.submit = lambda plan: (events.append(("submitted", plan)), submit(plan))
    executor.collect = lambda check: (collect(check), events.append(("read", None)))[0]
    return events


def segments_of(events):
    return [segment for _, plan in events if plan is not None for segment in plan.segments]


CASES = [
    {"page": 4, "folder": "deepseek-v3", "drafts": "mtp:3", "kind": "near"},
    {"page": 1, "folder": "glm4-moe", "drafts": "mtp:4", "kind": "right"},
    {"page": 16, "folder": "llama-seven", "drafts": "eagle3:3"},
    {"page": 1, "folder": "mistral-windowed", "drafts": "draft:2"},
]


@pytest.mark.parametrize("case", named(CASES))
def test_tokens_are_those_without_drafts_and_drafts_those_of_steps_that_wait(case, monkeypatch):
    """Greedy and sampled requests meet and leave; one has penalties. Nothing in the cache that has not been
    written is read. With all drafts in every step, so that steps that wait come to the same texts."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, most, rows, fixed_rows: most)
    page, *how = case.values()
    folder, how = speculative(*how)
    waiting, *others = [drafts_of(folder, how, page, *kind) for kind in ((False, False), (True, False), (True, True))]
    for ahead in others:
        both = waiting.keys() & ahead.keys()
        assert len(both) > len(waiting) / 2
        for text in both:  # near a request's end fewer are drafted ahead
            shorter = min(len(waiting[text]), len(ahead[text]))
            assert waiting[text][:shorter] == ahead[text][:shorter]


def drafts_of(folder, how, page, is_ahead, recorded):
    """What is drafted behind which text."""
    options = {"attention_backend": "torch", "async_scheduling": is_ahead, "page_size": page}
    with start(folder, speculative=how, **options) as llm:
        (runner,) = llm.engine.executor.runners
        poison(runner.attention.pool, runner.drafter.attention.pool)
        events, replays = watch_steps(llm), []
        if recorded:
            (replays,) = replays_in(llm, record(llm))
        found = drafts_in(llm)
        assert mixed(llm) == mixed_without_drafts(folder)
        assert llm.stats().scheduler.accepted_tokens > 0
        llm.engine.scheduler.check_integrity()
    assert any(segment.slack for segment in segments_of(events)) == is_ahead
    assert not recorded or [count for verifies, count in replays if verifies].count(2) >= 4
    return dict(found)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_with_drafts_is_submitted_before_the_tokens_of_the_last_one_are_read(tp):
    folder = predictable_folder("llama")
    with start(folder, speculative=f"draft:2:{folder}", tp=tp, **AHEAD) as llm:
        events = watch_steps(llm)
        assert tokens_of(llm) == plain_tokens(folder)
        assert llm.stats().scheduler.accepted_tokens > 0
    unread, verified = 0, []
    for event, plan in events:
        if event == "submitted" and any(segment.sample > 1 for segment in plan.segments):
            verified.append(unread)
        unread += 1 if event == "submitted" else -1
    assert verified[1:-2] == [1] * len(verified[1:-2])
    assert len(verified) > 4


@pytest.mark.parametrize(
    "options",
    [
        {"speculative": "mtp:1", "tp": 2},
        {"speculative": "mtp:2", "max_num_batched_tokens": 24, "page_size": 1},
    ],
    ids=str,
)
def test_sampled_tokens_are_the_same_on_ranks_that_share_heads_in_chunks_and_after_prefix_hits(options):
    folder = folder_with_module("glm4-moe", "near")
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=16, logprobs=1)
    prompts = [*PROMPTS, PROMPTS[0] + [5, 6, 7]]
    with start(folder, **AHEAD, **options) as llm:
        events = watch_steps(llm)
        found = [*tokens_of(llm, prompts, params), *tokens_of(llm, prompts[3:], params)]  # with prefix hits
        expected = plain_tokens(folder, tuple(map(tuple, prompts)), params)
        assert found == [*expected, expected[3]]
        assert any(segment.slack for segment in segments_of(events))
        llm.engine.scheduler.check_integrity()


def test_a_row_that_could_not_be_sampled_is_computed_again():
    """The device goes on before it, as the driver will, who is a step behind."""
    folder, broken = folder_with_module("glm4-moe", "right"), []
    with start(folder, speculative="mtp:3", **AHEAD) as llm:
        (runner,) = llm.engine.executor.runners
        model, head = runner.model, runner.model.head

        def without_a_row(hidden):
            """In two of three steps a row behind drafts has no logits that are numbers, and so has what follows it."""
            logits = head(hidden)
            if len(logits) == 4:
                number = len(broken) % 3
                if number < 2:
                    logits[1 + number :] = torch.nan
                broken.append(number)
            return logits

        model.head = without_a_row
        events = watch_steps(llm)
        assert tokens_of(llm, PROMPTS[:1]) == plain_tokens(folder)[:1]
        assert len(broken) > 2
        assert len([segment for segment in segments_of(events) if segment.slack]) > 3
        llm.engine.scheduler.check_integrity()


def test_no_row_can_be_behind_the_last_position_of_its_request_however_many_drafts_are_right():
    folder = folder_with_module("glm4-moe", "right")
    with start(folder, speculative="mtp:3", page_size=1, **AHEAD) as llm:
        events = watch_steps(llm)
        for most in range(1, 9):
            params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
            assert [len(tokens) for tokens in tokens_of(llm, PROMPTS[:1], params)] == [most]
            assert max(each.stop + each.slack for each in segments_of(events)) <= len(PROMPTS[0]) + most - 1
            pages = [page for _, plan in events if plan for new in plan.new_pages for page in new.pages]
            held = [page for _, plan in events if plan for each in plan.admitted for page in each.pages]
            assert len(pages) + len(held) <= len(PROMPTS[0]) + most - 1
            events.clear()


def test_requests_that_the_host_must_follow_wait_beside_others_that_run_ahead():
    folder = folder_with_module("glm4-moe", "near")
    free = {"temperature": 0, "max_tokens": 12}
    kinds = [
        SamplingParams(**free),
        SamplingParams(**free, repetition_penalty=1.3),
        SamplingParams(**free, min_tokens=9, stop_token_ids=tuple(range(0, 90, 3))),
        SamplingParams(**free, logit_bias=((5, 3.0), (9, 3.0))),
    ]
    prompts = [prompt_of(9 + number, number) for number in range(4)]
    with start(folder) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, kinds)]
    with start(folder, speculative="mtp:2", **AHEAD) as llm:
        events = watch_steps(llm)
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, kinds)] == expected
    ahead = {segment.request_id for segment in segments_of(events) if segment.pending}
    assert len(ahead) == 3


PENALTIES = [{"frequency_penalty": 0.9}, {"presence_penalty": -0.8}, {"repetition_penalty": 1.3}, {}]


@pytest.mark.parametrize(("recorded", "drafts"), [(False, 4), (True, 3)])
def test_penalties_count_what_only_the_device_knows(recorded, drafts, monkeypatch):
    """Tokens of steps whose results have not been read, behind right drafts and before them, and drafts of the step
    itself."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, most, rows, fixed_rows: most)
    folder, many = folder_with_module("glm4-moe", "near"), range(8)
    prompts = [prompt_of(5 + number, number) for number in many]
    params = [
        SamplingParams(temperature=0.7 * (number // 4), seed=number, max_tokens=24 + number, **PENALTIES[number % 4])
        for number in many
    ]
    with start(folder) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with start(folder, speculative=f"mtp:{drafts}", **AHEAD) as llm:
        events = watch_steps(llm)
        replays = replays_in(llm, record(llm)) if recorded else []
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.stats().scheduler.accepted_tokens > 20
    assert len({segment.request_id for segment in segments_of(events) if segment.slack}) == len(many)
    assert not recorded or [count for verifies, count in replays[0] if verifies].count(2) > 4


@pytest.mark.parametrize("options", [{"pcp": 2}, {"attention_backend": "cpu"}], ids=str)
def test_where_no_device_knows_which_drafts_are_right_steps_wait(options):
    folder = folder_with_module("glm4-moe", "near")
    with start(folder, speculative="mtp:2", **{**AHEAD, **options}) as llm:
        events = watch_steps(llm)
        assert tokens_of(llm) == plain_tokens(folder)
        assert not any(segment.pending for segment in segments_of(events))


def test_backends_that_say_so_write_to_slots_of_the_device_and_have_causal_runs():
    shape = BackendShape(head_dim=8, value_dim=8, kv_factor=2, quantised=False, dtype=torch.float32)
    slots = torch.tensor([0], dtype=torch.int32)
    here = [each for each in BACKENDS.values() if "cpu" in each.devices or not each.devices]
    assert {each.name for each in here} >= {"torch", "cpu", "compiled"}
    for each in here:
        built = each.build(torch.device("cpu"), shape)
        assert each.device_slots == (built.causal_runs and built.slot_writer(slots) is not None)
