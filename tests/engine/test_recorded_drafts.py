"""Steps that verify and make drafts are two replays: tokens and drafts are those of steps that are not recorded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from longspan import SamplingParams
from longspan.engine.rank.build import make_ready
from longspan.engine.rank.draft_chain import ChainInputs
from longspan.engine.rank.draft_graphs import DraftGraphs, RecordedParts, verification_sizes
from longspan.engine.rank.recorder import CountedRecorder
from longspan.engine.rank.sampling.gumbel import outcome
from longspan.engine.rank.warmup import largest_plans
from longspan.plan.drafts import sampled_rows
from longspan.scheduler.draft_length import DraftLength
from tests.drafting import eagle3_folder, folder_with_module, predictable_folder
from tests.engine.drafted import GREEDY, PROMPTS, drafts_in, named, plain_tokens, start, tokens_of
from tests.engine.test_recorded_decode import Counting, RefillableTorch, Runs
from tests.oracle import VOCAB, prompt_of, tiny_folder

MIXED = [
    (PROMPTS[0], GREEDY),
    (PROMPTS[1], SamplingParams(temperature=0.8, seed=5, max_tokens=11)),
    (PROMPTS[2], SamplingParams(temperature=0.5, seed=1, max_tokens=9, presence_penalty=1.0, top_k=5)),
    (prompt_of(3, 5), SamplingParams(temperature=0, max_tokens=17)),
]  # enter and leave at different steps
SHORT_ANSWER = SamplingParams(temperature=0, max_tokens=5)
SIZES, PROMPT_SIZES = (4, 8, 16), (16, 32)  # some steps are larger, and are not recorded


class Full(RefillableTorch):
    """Has no room for the runs of any step."""

    def indexed(self, rows, longest, index):
        return Runs(self, rows, has_room=False)


def record(llm, kinds=lambda rank: (RefillableTorch, RefillableTorch), prompt_sizes=PROMPT_SIZES):
    """Let every rank record its steps, and drafting, with backends of two kinds; what counts the replays of each."""
    return [
        record_rank(runner, kinds(rank), prompt_sizes) for rank, runner in enumerate(llm.engine.executor.runners)
    ]  # fmt: skip


def record_rank(runner, kinds, prompt_sizes):
    recorder, drafter = Counting(), runner.drafter
    backend, own = (kind(torch.device("cpu")) for kind in kinds)
    drafter.attention.ops = replace(drafter.attention.ops, backend=own)
    runner.attention.ops = replace(runner.attention.ops, backend=backend)
    parts = RecordedParts(runner.model, runner.attention, backend, drafter.chain, own, drafter.first_input)
    counted = CountedRecorder(recorder, runner._groups.tp.traffic)
    runner.drafter = drafter.with_graphs(DraftGraphs(parts, counted, SIZES, prompt_sizes))
    return recorder


def replays_in(llm, recorders):
    """Of each rank: (whether there are drafts in the step, replays), of every step with rows from now on."""
    return [replays_of(*each) for each in zip(llm.engine.executor.runners, recorders, strict=True)]


def replays_of(runner, recorder):
    begin, found = runner.start, []

    def counted(plan):
        before, verifies = recorder.replayed, any(segment.sample > 1 for segment in plan.segments)
        finish = begin(plan)
        if plan.segments:
            found.append((verifies, recorder.replayed - before))
        return finish

    runner.start = counted
    return found


def mixed(llm):
    """Tokens of requests that meet, and of a long prompt behind them: its first chunk is not recorded."""
    prompts, params = zip(*MIXED, strict=True)
    outputs = [*llm.generate(list(prompts), list(params)), *llm.generate([prompt_of(59, 6)], SHORT_ANSWER)]
    return [output.outputs[0].token_ids for output in outputs]


CASES = [
    *({"folder": folder, "kind": kind, "drafts": f"mtp:{tokens}"} for folder, kind, tokens in (
        ("deepseek-v3", "near", 1), ("deepseek-v3", "near", 3), ("glm4-moe", "right", 4), ("glm4-moe", "wrong", 2),
    )),
    {"folder": "llama-seven", "drafts": "eagle3:3"},
    {"folder": "mistral-windowed", "drafts": "draft:3"},
]  # fmt: skip


def speculative(folder, drafts, kind=""):
    """The folder of a case, and what drafts for it."""
    if drafts.startswith("eagle3"):
        return predictable_folder(folder), f"{drafts}:{eagle3_folder('near')}"
    if drafts.startswith("draft"):
        return predictable_folder(folder), f"{drafts}:{predictable_folder(folder)}"
    return folder_with_module(folder, kind), drafts


@pytest.mark.parametrize("case", named(CASES))
def test_a_step_is_two_replays_and_gives_the_tokens_and_drafts_of_one_that_is_not_recorded(case):
    """Steps with prompts, with and without drafts, and such that are too large, follow each other."""
    folder, how = speculative(**case)
    tokens, drafts = [], []
    for recorded in (False, True):
        with start(folder, speculative=how, attention_backend="torch") as llm:
            if recorded:
                (replays,) = replays_in(llm, record(llm))
            found = drafts_in(llm)
            tokens.append(mixed(llm))
            drafts.append(found)
            counters = llm.stats().scheduler
    assert tokens[0] == tokens[1] == mixed_without_drafts(folder)
    assert drafts[0] == drafts[1]
    assert {count for _, count in replays} == {0, 2}
    assert replays.count((True, 2)) >= 4
    assert replays.count((False, 2)) >= 2  # the last chunk of the long prompt
    assert (counters.accepted_tokens > 0) == (case.get("kind") != "wrong")


@cache
def mixed_without_drafts(folder):
    with start(folder) as llm:
        return mixed(llm)


@pytest.mark.parametrize(("name", "how"), [("deepseek-v3", "mtp:3"), ("llama-seven", "eagle3:3")])
def test_contexts_too_scattered_for_the_buffers_of_drafting_are_drafted_after_without_a_graph(name, how):
    folder, how = speculative(name, how, "near")
    drafts = []
    for later in (RefillableTorch, Full):
        with start(folder, speculative=how, attention_backend="torch") as llm:
            (replays,) = replays_in(llm, record(llm, lambda rank: (RefillableTorch, later), prompt_sizes=()))  # noqa: B023
            drafts.append(drafts_in(llm))
            assert tokens_of(llm) == plain_tokens(folder)
    assert drafts[0] == drafts[1]
    assert max(count for _, count in replays) == 1


def test_all_is_recorded_and_every_number_of_drafts_has_run_before_the_first_request_the_largest_first():
    """With pages of one token, so that the made-up requests need pages for what is drafted behind their drafts."""
    folder, how = speculative("llama-seven", "eagle3:3")
    with start(folder, speculative=how, attention_backend="torch", page_size=1) as llm:
        (recorder,), (runner,) = record(llm), llm.engine.executor.runners
        (replays,), seen = replays_in(llm, [recorder]), []
        begin = runner.drafter.graphs.record
        runner.drafter.graphs.record = lambda: (seen.append(rows) or rows for rows in begin())
        make_ready(runner, llm.engine.setup, shown=False)
        assert seen == [*reversed(SIZES), *reversed(PROMPT_SIZES)]
        assert (True, 2) in replays
        recorded = recorder.recorded
        assert recorded == sum(1 + len({-(-rows // 4), rows}) for rows in seen)
        mixed(llm)
        assert recorder.recorded == recorded


def test_the_largest_steps_have_all_drafts_of_all_requests():
    folder, how = speculative("llama-seven", "eagle3:3")
    with start(folder, speculative=how, max_num_seqs=6) as llm:
        samples = [[segment.sample for segment in plan.segments] for plan in largest_plans(llm.engine.setup)]
    assert [1] * 6 in samples
    assert [4] * 6 in samples


def test_sizes_end_with_the_first_that_has_room():
    assert verification_sizes(1, 3) == (8,)
    assert verification_sizes(33, 3) == (8, 16, 24, 32, 48)
    assert verification_sizes(2048, 3)[-1] == 256


def test_the_user_chooses_for_how_many_requests_with_drafts_steps_are_recorded():
    assert verification_sizes(33, 3, (16, 1, 10)) == (4, 40)


def test_drafts_behind_a_wrong_one_are_not_accepted_even_if_they_are_right():
    """Requests with three drafts, of which the second is wrong; with two; and without drafts. Nor is one that no token
    could be sampled behind."""
    inputs = ChainInputs(
        **{name: torch.empty(0) for name in ("next_ids", "sample_rows", "slots")},
        first_samples=torch.tensor([0, 4, 7]), first_rows=torch.tensor([0, 4, 8]), drafts=torch.tensor([3, 2, 0]),
    )  # fmt: skip
    token_ids = torch.tensor([0, 5, 6, 7, 0, 8, 9, 3, 4])  # before the last one is a row of a prompt
    sampled, peaks = torch.tensor([5, 1, 7, 2, 8, 9, 3, 4]), torch.zeros(8)
    assert inputs.accepted(outcome(sampled, peaks), token_ids, 3).tolist() == [1, 2, 0]
    peaks[5] = torch.nan
    assert inputs.accepted(outcome(sampled, peaks), token_ids, 3).tolist() == [1, 0, 0]


def poison(*pools):
    """Fill the cache with NaN, which memory that was never written may hold."""
    for pool in pools:
        for rows in pool.layers.values():
            rows.values.fill_(torch.nan)


class Forced:
    """Drafts after tokens of which the first drafts are made right, in two ways that are compared."""

    def __init__(self, drafter):
        self.drafter, self.compared, self.accepted = drafter, 0, None

    def hidden(self, *step):
        return None

    def settle(self, *step):
        return None

    def draft(self, step, requests):
        rows = sampled_rows(step.plan, step.view, requests)
        for right in range(self.drafter.tokens + 1):
            drawn = step.drawn.clone()
            forced = drawn[0]
            for each in rows:
                for number, draft in enumerate(step.view.token_ids[each.row + 1 : each.row + each.rows]):
                    forced[each.sample + number] = draft if number < right else (draft + 1) % VOCAB
            there, here = (self.start(kind, replace(step, drawn=drawn), requests)() for kind in ("there", "here"))
            assert there == here
            self.compared += sum(each.rows > right > 0 for each in rows)
        return self.start("here", step, requests)

    def start(self, kind, step, requests):
        drafter = self.drafter if kind == "here" else replace(self.drafter, chain=None)
        drafter.attention.begin(drafter.attention.preparer.step(step.view))
        return drafter.draft(step, requests)


@pytest.mark.parametrize(
    ("folder", "how"),
    [("mistral-windowed", "draft:3"), ("deepseek-v3", "mtp:3")],
)
def test_wherever_the_last_right_draft_is_the_device_drafts_what_ranks_that_tell_each_other_would(
    folder, how, monkeypatch
):
    """With random weights, so that a draft follows from the positions and tokens of all rows before it, and nothing in
    the cache that has not been written."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, most, rows, fixed_rows: most)
    target = folder_with_module(folder, "random") if how.startswith("mtp") else tiny_folder(folder)
    how = how if how.startswith("mtp") else f"{how}:{tiny_folder(folder)}"
    with start(target, speculative=how, attention_backend="torch") as llm:
        (runner,) = llm.engine.executor.runners
        poison(runner.attention.pool, runner.drafter.attention.pool)
        runner.drafter = forced = Forced(runner.drafter)
        mixed(llm)
    assert forced.compared > 20
