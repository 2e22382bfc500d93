"""The work of decode rows with arrays is that of `plan_work`, and their index names the slots of their contexts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from longspan.attention.backends.triton import plan as plans
from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.backends.triton.columns import ColumnTable, DecodeColumns
from longspan.attention.backends.triton.decode import DecodeWork, plan_decode
from longspan.attention.backends.triton.plan import ITEM_FIELDS, RefillablePlans, WorkPlan
from longspan.attention.backends.triton.work import Slots, Stretch, Tiling, VisibleColumns, Work, plan_work
from longspan.attention.step_buffer import StepBuffer
from longspan.cache.pages import ShardPages
from longspan.plan.decode import DecodeRuns

PAGE = 16
TILINGS = [
    Tiling(group=4, kv_heads=8, block_m=16, block_n=64, programs=264),
    Tiling(group=128, kv_heads=1, block_m=64, block_n=32, programs=264),  # several blocks a row, as for latents
    Tiling(group=3, kv_heads=2, block_m=16, block_n=32, programs=16),
]


class Contexts:
    """Requests whose contexts grow in one pool, in turn or alone."""

    def __init__(self, pick: random.Random, count: int) -> None:
        self._pick = pick
        self.pages = [ShardPages() for _ in range(count)]
        self.tokens = [0] * count
        self._free = 0

    def grow(self, number: int, tokens: int) -> None:
        """More tokens, on pages behind the request's own or behind those of others."""
        self.tokens[number] += tokens
        pages = self.pages[number]
        while len(pages.ordinals) * PAGE < self.tokens[number]:
            if self._pick.random() < 0.02:
                self._free += 1  # another request's page
            pages.append(len(pages.ordinals), self._free)
            self._free += 1

    def runs(self, window: int | None) -> DecodeRuns:
        """One row for each request, at its last token; one row between two of them has none."""
        seen = [number for number, tokens in enumerate(self.tokens) if tokens]
        firsts = [max(0, self.tokens[number] - window) if window else 0 for number in seen]
        rows = [number + (number > 2) for number in seen]
        return DecodeRuns(rows, [self.pages[n] for n in seen], firsts, [self.tokens[n] for n in seen], PAGE)


def slots_of(runs: DecodeRuns) -> list[list[int]]:
    """The slots that each row sees."""
    return [[slot for span in run.spans for slot in range(span.slot, span.slot + span.length)] for run in runs]


def visible(columns: DecodeColumns) -> list[VisibleColumns]:
    """The same for `plan_work`."""
    found, at = [], 0
    for row, low, high, count in zip(columns.rows, columns.lows, columns.highs, columns.counts, strict=True):
        ends = [*columns.starts[at + 1 : at + count].tolist(), int(high)]
        stretches = tuple(
            Stretch(int(columns.starts[at + n]), ends[n], int(columns.places[at + n]), bool(columns.gathered[at + n]))
            for n in range(count)
        )
        found.append(VisibleColumns(int(row), stretches, (int(low),), (int(high),)))
        at += count
    return found


def in_lists(work: DecodeWork) -> Work:
    def tuples(records: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(record) for record in records.tolist()]

    parts = (work.adjacent, work.gathered, work.splits, work.bounds)
    return Work(*map(tuples, parts), Slots(), work.partials)


def grown(pick: random.Random, steps: int):
    """Contexts that grow, most by one token a step, a few by many, and now and then one that begins."""
    contexts = Contexts(pick, 7)
    for number in range(5):
        contexts.grow(number, pick.choice([1, 15, 16, 40, 700, 1010, 3000, 9000]))
    for _ in range(steps):
        yield contexts
        for number in range(7):
            if contexts.tokens[number] or pick.random() < 0.02:
                contexts.grow(number, 1 if pick.random() < 0.95 else pick.choice([16, 300, 1500]))


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_end_begin_and_move_to_other_rows_take_their_columns_along(seed):
    pick = random.Random(seed)
    contexts, running, columns = Contexts(pick, 60), list(range(9)), None
    table = ColumnTable(200_000, torch.device("cpu"))
    for step in range(60):
        for number in running:
            contexts.grow(number, 1 if contexts.tokens[number] else pick.choice([1, 40, 1010, 3000]))
        pages, stops = [contexts.pages[n] for n in running], [contexts.tokens[n] for n in running]
        runs = DecodeRuns(list(range(len(running))), pages, [0] * len(running), stops, PAGE)
        columns, alone = table.of(runs, columns), table.of(runs)
        for name in ("rows", "lows", "highs", "counts", "starts", "places", "gathered", "above", "until"):
            assert np.array_equal(getattr(columns, name), getattr(alone, name)), (step, name)
        assert columns.requests == alone.requests
        if pick.random() < 0.5:
            running.remove(pick.choice(running))
        if len(running) < 6 or pick.random() < 0.3:
            running.insert(pick.randrange(len(running) + 1), step % 50 + 9)
        running = list(dict.fromkeys(running))
        if pick.random() < 0.1:
            pick.shuffle(running)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("seed", range(6))
def test_every_row_sees_the_slots_of_its_context_at_every_step(seed, window):
    table, columns = ColumnTable(200_000, torch.device("cpu")), None
    for contexts in grown(random.Random(seed), 60):
        runs = contexts.runs(window)
        columns = table.of(runs, columns)
        index = table.index.tolist()
        for seen, expected in zip(visible(columns), slots_of(runs), strict=True):
            slots = [
                index[each.place + column] if each.gathered else each.place + column
                for each in seen.stretches
                for column in range(max(each.start, seen.lows[0]), each.stop)
            ]
            assert slots == expected


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("seed", range(6))
def test_the_work_is_that_of_the_planner(seed, window, tiling):
    table = ColumnTable(200_000, torch.device("cpu"))
    for contexts in grown(random.Random(seed), 15):
        runs = contexts.runs(window)
        few = DecodeRuns(runs.rows[:3], runs.pages[:3], runs.firsts[:3], runs.stops[:3], PAGE)  # one by one
        for columns in (table.of(runs), table.of(few)):
            for rows in (8, 16):
                expected = plan_work(visible(columns), Slots(), rows, tiling)
                assert in_lists(plan_decode(columns, rows, tiling)) == expected


def covered(plan: WorkPlan, tiling: Tiling) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """For each row and first packed row, the joined ranges of its items: (gathered, place, start, stop)."""
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    items = [
        (gathered, *item)
        for gathered, table in enumerate((plan.adjacent, plan.gathered))
        for item in table.view(-1)[: len(table) // ITEM_FIELDS * ITEM_FIELDS].view(-1, ITEM_FIELDS).tolist()
    ]
    for gathered, row, first, size, place, start, full_start, full_stop, stop, *_ in sorted(items, key=lambda i: i[5]):
        if not size:
            continue
        assert (full_start, full_stop) == (start, start + (stop - start) // tiling.block_n * tiling.block_n)
        ranges = found.setdefault((row, first), [])
        if ranges and ranges[-1][:2] == (gathered, place) and ranges[-1][3] == start:
            start = ranges.pop()[2]
        ranges.append((gathered, place, start, stop))
    return found


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("seed", range(3))
def test_work_that_grows_with_its_contexts_covers_what_rows_see(seed, window, tiling):
    """It is that of a plan made for this step alone."""
    table = ColumnTable(200_000, torch.device("cpu"))
    kept = RefillablePlans(8, 1, 0, torch.device("cpu"), table)
    plan = kept.plan(tiling)
    for contexts in grown(random.Random(seed), 90):
        runs = contexts.runs(window)
        assert kept.fill(runs)
        anew = RefillablePlans(8, 1, 0, torch.device("cpu"), table)
        expected = anew.plan(tiling)
        anew.fill(runs)
        assert torch.equal(plan.bounds, expected.bounds)
        assert covered(plan, tiling) == covered(expected, tiling)


def test_contexts_that_get_a_token_each_are_planned_once_in_a_tile_of_tokens(monkeypatch):
    planned = []
    monkeypatch.setattr(plans, "plan_decode", lambda *given: planned.append(1) or plan_decode(*given))
    contexts = Contexts(random.Random(0), 3)
    for number, tokens in enumerate((40, 600, 3000)):
        contexts.grow(number, tokens + 100)  # adjacent pages, ahead of the tokens
        contexts.tokens[number] = tokens
    kept = RefillablePlans(8, 1, 0, torch.device("cpu"), ColumnTable(200_000, torch.device("cpu")))
    kept.plan(TILINGS[0])
    for _ in range(TILINGS[0].block_n + 1):
        assert len(planned) <= 1
        assert kept.fill(contexts.runs(None))
        contexts.tokens = [tokens + 1 for tokens in contexts.tokens]
    assert len(planned) == 2


def test_no_row_is_no_work():
    columns = ColumnTable(10, torch.device("cpu")).of(DecodeRuns([], [], [], [], PAGE))
    assert in_lists(plan_decode(columns, 8, TILINGS[0])) == plan_work([], Slots(), 8, TILINGS[0])


def test_an_unchanged_context_is_not_sent_again(monkeypatch):
    sent = []
    send = ColumnTable._send
    monkeypatch.setattr(ColumnTable, "_send", lambda table: sent.append(sum(map(len, table._slots))) or send(table))
    pick = random.Random(0)
    contexts = Contexts(pick, 4)
    for _ in range(40):  # in turn, so that no two pages are adjacent
        for number in range(4):
            contexts.grow(number, PAGE)
    table = ColumnTable(10_000, torch.device("cpu"))
    for _ in range(2 * PAGE):
        for number in range(4):
            contexts.grow(number, 1)
        table.of(contexts.runs(None))
    assert sent[0] == 4 * 41 * PAGE
    assert sum(sent[1:]) == 4 * PAGE  # the page that each got


def test_an_index_is_not_begun_anew_for_the_second_layer_group_of_a_step(monkeypatch):
    """Both groups read it in the same launches: the first would read what the second has written."""
    monkeypatch.setattr("longspan.attention.backends.triton.columns._FORGET", 4)
    contexts = Contexts(random.Random(0), 9)
    for _ in range(10):
        for number in range(9):
            contexts.grow(number, PAGE)
    table = ColumnTable(10_000, torch.device("cpu"))
    for number in range(6):  # requests that end
        table.of(DecodeRuns([0], contexts.pages[number : number + 1], [0], contexts.tokens[number : number + 1], PAGE))
    runs = DecodeRuns([0, 1, 2], contexts.pages[6:], [0] * 3, contexts.tokens[6:], PAGE)
    assert table.of(runs) is not None
    assert table.of(runs) is None  # so this step is computed without a graph
    assert table.of(runs) is not None


def test_a_full_index_is_begun_anew():
    contexts = Contexts(random.Random(0), 7)
    table = ColumnTable(1_000, torch.device("cpu"))
    for _ in range(10):
        for number in range(7):
            contexts.grow(number, PAGE)
    few, other = (
        DecodeRuns([0], contexts.pages[number : number + 1], [0], contexts.tokens[number : number + 1], PAGE)
        for number in range(2)
    )
    before = table.of(few)
    assert table.of(contexts.runs(None)) is None
    table.of(other)  # which has the place of the first one now
    columns = table.of(few, before)
    (seen,) = visible(columns)
    (stretch,) = seen.stretches
    assert table.index[stretch.place : stretch.place + 160].tolist() == slots_of(few)[0]


def test_the_index_has_room_for_many_requests_that_share_a_system_prompt():
    """Else each of their steps would find it full, and none would be replayed."""
    shared, own, requests = 3072 // PAGE, 128 // PAGE, 64
    every = [ShardPages() for _ in range(requests)]
    for number, pages in enumerate(every):
        for ordinal in range(shared + own):
            pages.append(ordinal, ordinal if ordinal < shared else ordinal + number * own)
    slots, device = (shared + requests * own) * PAGE, torch.device("cpu")
    runs = TritonBackend(device, 16).refillable(requests, slots, StepBuffer(device))
    assert runs.fill(DecodeRuns(list(range(requests)), every, [0] * requests, [(shared + own) * PAGE] * requests, PAGE))
