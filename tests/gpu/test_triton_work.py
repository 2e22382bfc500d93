"""The planner of the Triton backend: who meets whom, once each, in pieces that are evenly long."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from longspan.attention.backends.triton.work import (
    Slots,
    Tiling,
    VisibleColumns,
    Work,
    most_items,
    plan_work,
    visible_in_runs,
    visible_on_diagonal,
)
from longspan.cache.pages import Span
from longspan.plan.reach import QueryRun

TILING = Tiling(group=3, kv_heads=2, block_m=16, block_n=32, programs=16)


def pairs(work: Work, tiling: Tiling) -> Counter[tuple[int, int]]:
    """How often each (packed row, slot) is attended, as the kernel reads the items."""
    found: Counter[tuple[int, int]] = Counter()
    index = [slot for span in work.index.spans for slot in range(span.slot, span.slot + span.length)]
    for items, gathered in ((work.adjacent, False), (work.gathered, True)):
        for item in items:
            assert item.size <= tiling.block_m
            assert (item.full_start - item.start) % tiling.block_n == 0
            assert (item.full_stop - item.full_start) % tiling.block_n == 0
            for flat in range(item.first, item.first + item.size):
                token = item.row + flat // tiling.group
                low, high = work.bounds[token]
                for column in range(item.start, max(item.stop, item.full_stop)):
                    full = item.full_start <= column < item.full_stop
                    if full or low <= column < min(high, item.stop):
                        slot = index[item.place + column] if gathered else item.place + column
                        found[token * tiling.group + flat % tiling.group, slot] += 1
    return found


def rows_written(work: Work, tiling: Tiling) -> Counter[int]:
    """How often each packed row's result is written: by an item alone, or by the reduction."""
    alone = [item for item in [*work.adjacent, *work.gathered] if item.partial < 0]
    return Counter(
        block.row * tiling.group + flat
        for block in [*alone, *work.splits]
        for flat in range(block.first, block.first + block.size)
    )


def random_spans(random: random.Random) -> tuple[Span, ...]:
    slots = random.sample(range(50), random.randint(0, 6))
    return tuple(Span(slot * 2000, random.choice([1, 2, 31, 32, 100, 1024, 1500])) for slot in slots)


def random_runs(random: random.Random) -> tuple[list[QueryRun], int]:
    runs: list[QueryRun] = []
    row = 0
    for _ in range(random.randint(0, 4)):
        row += random.choice([0, 0, 2])
        length, spans = random.choice([1, 1, 4, 23]), random_spans(random)
        tokens = sum(span.length for span in spans)
        lows = tuple(sorted(random.randint(0, tokens) for _ in range(length)))
        runs.append(QueryRun(row, length, spans, random.choice([None, lows])))
        row += length
    return runs, row + random.choice([0, 3])


@pytest.mark.parametrize("seed", range(40))
def test_every_row_meets_every_slot_it_sees_once_and_is_written_once(seed):
    runs, rows = random_runs(random.Random(seed))
    visible, index = visible_in_runs(runs)
    tiling = replace(TILING, programs=[1, 16, 200][seed % 3])
    work = plan_work(visible, index, rows, tiling)
    expected: Counter[tuple[int, int]] = Counter()
    for run in runs:
        slots = [slot for span in run.spans for slot in range(span.slot, span.slot + span.length)]
        for row in range(run.length):
            for slot in slots[run.window_starts[row] if run.window_starts else 0 :]:
                expected.update(((run.row + row) * tiling.group + head, slot) for head in range(tiling.group))
    assert pairs(work, tiling) == expected
    assert rows_written(work, tiling) == Counter(range(rows * tiling.group))


@pytest.mark.parametrize("tokens, window", [(1, None), (70, None), (70, 1), (70, 20), (70, 100)])
def test_the_diagonal_sees_the_tokens_up_to_its_own(tokens, window):
    work = plan_work(visible_on_diagonal([(0, tokens)], window), Slots(), tokens, TILING)
    assert pairs(work, TILING) == Counter(
        (row * TILING.group + head, column)
        for row in range(tokens)
        for column in range(max(0, row + 1 - (window or tokens)), row + 1)
        for head in range(TILING.group)
    )


def test_partial_results_of_a_split_block_are_adjacent_and_used_once():
    work = plan_work(*visible_in_runs([QueryRun(0, 9, (Span(0, 5000),))]), 9, TILING)
    items = [*work.adjacent, *work.gathered]
    assert sorted(item.partial for item in items if item.partial >= 0) == list(range(work.partials))
    for split in work.splits:
        owners = {item for item in items if split.part <= item.partial < split.last}
        assert {(item.row, item.first) for item in owners} == {(split.row, split.first)}
        assert {(item.part, item.last) for item in owners} == {(split.part, split.last)}


def decode(*tokens: int) -> list[VisibleColumns]:
    return visible_in_runs([QueryRun(row, 1, (Span(row << 20, length),)) for row, length in enumerate(tokens)])[0]


def test_one_long_context_keeps_every_processor_busy():
    tiling = Tiling(group=8, kv_heads=8, block_m=16, block_n=64, programs=264)
    work = plan_work(decode(131_072), Slots(), 1, tiling)
    assert len(work.adjacent) == 264 // 8
    lengths = [item.stop - item.start for item in work.adjacent]
    assert max(lengths) <= 131_072 / 33 + 64


def test_many_contexts_of_one_length_are_not_cut():
    tiling = Tiling(group=8, kv_heads=8, block_m=16, block_n=64, programs=264)
    work = plan_work(decode(*[8192] * 128), Slots(), 128, tiling)
    assert not work.splits


def test_one_context_much_longer_than_the_others_is_cut():
    tiling = Tiling(group=8, kv_heads=8, block_m=16, block_n=64, programs=264)
    work = plan_work(decode(*[1000] * 40, 500_000), Slots(), 41, tiling)
    total = sum(item.stop - item.start for item in work.adjacent)
    assert max(item.stop - item.start for item in work.adjacent) * 264 <= 1.2 * total * 8
    assert len(work.splits) == 1


def test_decode_of_any_lengths_fits_the_capacity_of_refillable_runs():
    tiling = Tiling(group=8, kv_heads=8, block_m=16, block_n=64, programs=264)
    for seed in range(30):
        pick = random.Random(seed)
        tokens = [pick.choice([1, 100, 10_000, 1_000_000]) for _ in range(pick.randint(1, 64))]
        work = plan_work(decode(*tokens), Slots(), 64, tiling)
        assert len(work.adjacent) <= most_items(64, tiling)


def test_segments_of_one_request_share_the_index_of_its_short_spans():
    spans = tuple(Span(slot * 7, 3) for slot in range(100))
    _, index = visible_in_runs([QueryRun(0, 4, spans), QueryRun(4, 2, spans)])
    assert index.length == 300
