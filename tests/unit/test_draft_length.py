"""How many tokens are drafted for a request follows from how many proved right, and from the batch."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.scheduler.draft_length import DraftLength

K, FIXED = 4, 8


def after(*steps: tuple[int, int]) -> DraftLength:
    """A request that has had these steps: (drafted, accepted)."""
    length = DraftLength()
    for drafted, accepted in steps:
        length.add(drafted, accepted)
    return length


def goodput(chances: list[float], drafts: int, rows: int) -> float:
    """Tokens in the time of a row, if `rows` requests draft so many; `chances` are those of all up to a draft."""
    return rows * (1 + sum(chances[:drafts])) / (FIXED + rows * (1 + drafts))


def test_a_request_begins_with_all_drafts():
    assert [DraftLength().choose(K, rows, FIXED) for rows in (1, 64, 4096)] == [K] * 3


def test_all_drafts_stay_where_all_are_right_whatever_the_batch():
    length = after(*[(K, K)] * 100)
    assert [length.choose(K, rows, FIXED) for rows in (1, 64, 4096)] == [K] * 3


def test_where_no_draft_is_right_one_is_tried_every_16_steps():
    length = after(*[(K, 0)] * 40)
    assert [length.choose(K, 1, FIXED) for _ in range(48)] == ([0] * 15 + [1]) * 3


def test_drafts_come_back_with_text_that_is_copied():
    length = after(*[(K, 0)] * 40)
    tried = 0
    for _ in range(200):
        tried = length.choose(K, 1, FIXED)
        length.add(tried, tried)
    assert tried == K


def test_larger_batches_draft_less():
    length = after(*[(K, accepted) for accepted in (0, 1, 2, 4)] * 4)
    found = [length.choose(K, rows, FIXED) for rows in (1, 8, 32, 256)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, K), min_size=1, max_size=30), st.integers(1, 300))
def test_the_number_gives_the_most_tokens_in_the_time_of_a_step(accepted, rows):
    chances, likely, chance = [], 1.0, 1.0
    for position in range(K):
        reached = sum(count >= position for count in accepted)
        right = sum(count > position for count in accepted)
        likely = (right + likely) / (reached + 1)
        chance *= likely
        chances.append(chance)
    found = after(*((K, count) for count in accepted)).choose(K, rows, FIXED)
    best = max(goodput(chances, drafts, rows) for drafts in range(K + 1))
    assert goodput(chances, found, rows) > best - 1e-12
