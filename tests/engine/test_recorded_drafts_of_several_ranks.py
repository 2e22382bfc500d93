"""Ranks that share heads record steps with drafts as one rank does: what they send has the shapes of the graphs."""

from __future__ import annotations

from functools import cache

import pytest

from longspan.engine.setup import EngineSetup
from longspan.scheduler.draft_length import DraftLength
from tests.engine.drafted import drafts_in, start
from tests.engine.test_recorded_decode import RefillableTorch
from tests.engine.test_recorded_drafts import Full, mixed, mixed_without_drafts, poison, record, replays_in, speculative

BOTH = (RefillableTorch, RefillableTorch)
MTP, EAGLE3, DRAFT = ("deepseek-v3", "mtp"), ("llama-seven", "eagle3"), ("mistral-windowed", "draft")


@pytest.fixture(autouse=True)
def all_drafts_in_every_step(monkeypatch):
    """So that steps that wait and steps that do not come to the same texts."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, most, rows, fixed_rows: most)


@cache
def drafts_on_one_rank(folder, how):
    """What is drafted behind which text on one rank, where nothing is recorded or planned ahead."""
    with start(folder, speculative=how, attention_backend="torch") as llm:
        found = drafts_in(llm)
        mixed(llm)
    return dict(found)


def replays_of_ranks(folder, how, kinds=lambda rank: BOTH, **options):
    """Replays of each rank in each step. Tokens are those without drafts, and drafts those of one rank."""
    with start(folder, speculative=how, attention_backend="torch", **options) as llm:
        for runner in llm.engine.executor.runners:
            poison(runner.attention.pool, runner.drafter.attention.pool)
        replays = replays_in(llm, record(llm, kinds))
        found = drafts_in(llm)
        assert mixed(llm) == mixed_without_drafts(folder)
        llm.engine.scheduler.check_integrity()
    alone, drafts = drafts_on_one_rank(folder, how), dict(found)
    both = alone.keys() & drafts.keys()
    assert len(both) > len(alone) / 2
    for text in both:  # near a request's end fewer are drafted ahead
        shorter = min(len(alone[text]), len(drafts[text]))
        assert drafts[text][:shorter] == alone[text][:shorter]
    return replays


def _cases():
    """Half of the table in every run."""
    for number, tp in enumerate((2, 4)):
        for folder, how in (MTP, EAGLE3, DRAFT):
            for tokens in (1, 3):
                for ahead in (False, True):
                    often = ahead == ((number + tokens // 2) % 2 == 1)
                    marks = () if often else pytest.mark.exhaustive
                    name = f"tp{tp}-{folder}-{how}:{tokens}-{'ahead' if ahead else 'waiting'}"
                    yield pytest.param(tp, folder, f"{how}:{tokens}", ahead, id=name, marks=marks)


@pytest.mark.parametrize(("tp", "folder", "how", "ahead"), list(_cases()))
def test_every_rank_replays_twice_a_step_and_tokens_and_drafts_are_those_of_one_rank(tp, folder, how, ahead):
    """Cached rows that were never written hold NaN, so that a wrong row is seen."""
    folder, how = speculative(folder, how, "near")
    first, *others = replays_of_ranks(folder, how, tp=tp, async_scheduling=ahead)
    assert others == [first] * (tp - 1)
    assert {count for _, count in first} == {0, 2}
    assert [count for verifies, count in first if verifies].count(2) >= 4


@pytest.mark.parametrize(
    ("case", "kinds", "ahead", "replays"),
    [
        (MTP, (Full, Full), False, 0),
        (MTP, (Full, Full), True, 0),
        (MTP, (RefillableTorch, Full), True, 1),
        (EAGLE3, (Full, RefillableTorch), True, 1),
        (EAGLE3, (RefillableTorch, Full), False, 1),
    ],
)
def test_a_rank_without_room_computes_in_the_shapes_of_the_others(case, kinds, ahead, replays):
    """Or their sums would have other shapes. Without room are both, verification only, or drafting only. The module is
    random, so that a draft depends on all rows before it."""
    folder, how = case
    folder, how = speculative(folder, f"{how}:3", "random")
    with_room, without = replays_of_ranks(
        folder, how, lambda rank: kinds if rank else BOTH, tp=2, async_scheduling=ahead
    )  # fmt: skip
    assert {count for _, count in with_room} == {0, 2}
    assert {count for _, count in without} == {0, replays}


def test_a_mixture_is_recorded_too_where_every_rank_gets_all_rows(monkeypatch):
    """The graphs' ranks have equally many rows, and so have steps that are not recorded, of other numbers."""
    monkeypatch.setattr(EngineSetup, "gathers_rows", True)
    folder, how = speculative(*MTP[:1], "mtp:3", "near")
    first, other = replays_of_ranks(folder, how, tp=2, enable_expert_parallel=True, async_scheduling=True)
    assert first == other
    assert {count for _, count in first} == {0, 2}
