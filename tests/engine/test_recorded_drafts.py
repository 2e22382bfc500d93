"""Steps that verify and make drafts are two replays: tokens and drafts are those of steps that are not recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longspan import SamplingParams
from longspan.engine.rank.draft_chain import ChainInputs
from longspan.engine.rank.draft_graphs import DraftGraphs, RecordedParts, verification_sizes
from tests.drafting import eagle3_folder, folder_with_module, predictable_folder
from tests.engine.drafted import GREEDY, PROMPTS, drafts_in, named, plain_tokens, start, tokens_of
from tests.engine.test_recorded_decode import Counting, RefillableTorch, Runs
from tests.oracle import prompt_of

MIXED = [
    (PROMPTS[0], GREEDY),
    (PROMPTS[1], SamplingParams(temperature=0.8, seed=5, max_tokens=11)),
    (PROMPTS[2], SamplingParams(temperature=0.5, seed=1, max_tokens=9, presence_penalty=1.0, top_k=5)),
    (prompt_of(3, 5), SamplingParams(temperature=0, max_tokens=17)),
]  # enter and leave at different steps
SIZES, PROMPT_SIZES = (4, 8, 16), (16, 32)  # some steps are larger, and are not recorded


class Full(RefillableTorch):
    """Has no room for the runs of any step."""

    def indexed(self, rows, longest, index):
        return Runs(self, rows, has_room=False)


def record(llm, later=RefillableTorch, prompt_sizes=PROMPT_SIZES):
    """Let the only rank record its steps, and drafting with the backend `later`; what counts the replays."""
    (runner,) = llm.engine.executor.runners
    recorder, drafter = Counting(), runner.drafter
    backend, own = (kind(torch.device("cpu")) for kind in (RefillableTorch, later))
    drafter.attention.ops = replace(drafter.attention.ops, backend=own)
    runner.attention.ops = replace(runner.attention.ops, backend=backend)
    parts = RecordedParts(runner.model, runner.attention, backend, drafter.chain, own, drafter.first_input)
    runner.drafter = drafter.with_graphs(DraftGraphs(parts, recorder, SIZES, prompt_sizes))
    return recorder


def replays_in(llm, recorder):
    """(whether there are drafts in the step, replays), of every step with rows from now on."""
    (runner,) = llm.engine.executor.runners
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
    prompts, params = zip(*MIXED, strict=True)
    return [output.outputs[0].token_ids for output in llm.generate(list(prompts), list(params))]


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
            latent = llm.engine.setup.model.mla is not None
            replays = replays_in(llm, record(llm, prompt_sizes=() if latent else PROMPT_SIZES)) if recorded else []
            found = drafts_in(llm)
            tokens.append(mixed(llm))
            drafts.append(found)
            counters = llm.stats().scheduler
    assert tokens[0] == tokens[1] == mixed_without_drafts(folder)
    assert drafts[0] == drafts[1]
    assert {count for _, count in replays} == {0, 2}
    assert [count for verifies, count in replays if verifies].count(2) >= 4
    assert (counters.accepted_tokens > 0) == (case.get("kind") != "wrong")


def mixed_without_drafts(folder):
    with start(folder) as llm:
        return mixed(llm)


def test_contexts_too_scattered_for_the_buffers_of_drafting_are_drafted_after_without_a_graph():
    folder, how = speculative("deepseek-v3", "mtp:3", "near")
    drafts = []
    for later in (RefillableTorch, Full):
        with start(folder, speculative=how, attention_backend="torch") as llm:
            replays = replays_in(llm, record(llm, later, prompt_sizes=()))
            drafts.append(drafts_in(llm))
            assert tokens_of(llm) == plain_tokens(folder)
    assert drafts[0] == drafts[1]
    assert max(count for _, count in replays) == 1


def test_sizes_end_with_the_first_that_has_room():
    assert verification_sizes(1) == (8,)
    assert verification_sizes(33) == (8, 16, 24, 32, 48)
    assert verification_sizes(2048)[-1] == 256


def test_drafts_behind_a_wrong_one_are_not_accepted_even_if_they_are_right():
    """Requests with three drafts, of which the second is wrong; with two; and without drafts."""
    inputs = ChainInputs(
        **{name: torch.empty(0) for name in ("next_ids", "sample_rows", "first_rows", "positions", "slots")},
        first_samples=torch.tensor([0, 4, 7]),
        drafted=torch.tensor([[5, 6, 7], [8, 9, -1], [-1, -1, -1]]),
    )
    assert inputs.accepted(torch.tensor([5, 1, 7, 2, 8, 9, 3, 4])).tolist() == [1, 2, 0]
