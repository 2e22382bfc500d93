"""How a chunk is cut: balanced, on page boundaries, and never without room (idea 2)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.scheduler.segments import fits, pages_opened, room_for_chunk, split_chunk


@st.composite
def chunks(draw):
    ranks = draw(st.integers(1, 8))
    size = draw(st.sampled_from([1, 3, 16]))
    start = draw(st.integers(0, 200))
    room = draw(st.lists(st.integers(0, 40), min_size=ranks, max_size=ranks))
    load = draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
    tail = draw(st.integers(0, ranks - 1)) if start % size else None
    most = room_for_chunk(start, size, room)
    length = draw(st.integers(0, min(most, 300)))
    return start, start + length, size, room, load, tail


@given(chunks().filter(lambda case: case[1] > case[0]))
@settings(max_examples=400, deadline=None)
def test_pieces_cover_the_chunk_in_order_and_fit_the_room(case):
    start, stop, size, room, load, tail = case
    pieces = split_chunk(start, stop, size, room, load, tail)
    assert [piece.start for piece in pieces] == [start, *[piece.stop for piece in pieces[:-1]]]
    assert pieces[-1].stop == stop
    assert fits(pieces, size, room)
    if tail is not None:
        assert pieces[0].pcp == tail, "a half-full page is continued where it lies"
    assert all(piece.start % size == 0 for piece in pieces[1:]), "no page has two writers"


def test_too_little_room_is_an_error():
    with pytest.raises(ValueError, match="no room"):
        split_chunk(0, 10, 1, [2, 3], [0, 0], None)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_zigzag_balances_causal_work_within_a_page_a_piece(ranks):
    pieces = split_chunk(0, 4096, 16, [1000] * ranks, [0] * ranks, None)
    work = [0.0] * ranks
    for piece in pieces:
        work[piece.pcp] += (piece.stop**2 - piece.start**2) / 2
    assert max(work) / (sum(work) / ranks) < 1.05


def test_the_next_chunk_finds_its_half_full_page_on_the_rank_of_the_last_piece():
    first = split_chunk(0, 1001, 16, [100] * 3, [5, 0, 3], None)
    second = split_chunk(1001, 2001, 16, [100] * 3, [0, 0, 0], first[-1].pcp)
    assert second[0].pcp == first[-1].pcp == second[-1].pcp


def test_a_short_chunk_goes_whole_to_the_least_loaded_rank():
    assert split_chunk(0, 40, 16, [9, 9, 9], [4, 1, 2], None) == [(0, 40, 1)]


def test_pages_opened_counts_pages_that_begin_inside():
    assert pages_opened(0, 16, 16) == 1
    assert pages_opened(5, 16, 16) == 0
    assert pages_opened(5, 17, 16) == 1
