"""The best token of a row that its filters keep, in Triton.

It owns the last launch of `kernels.py`: one program for each row. A token is tried: if it is not kept, no token behind
it is, and the best of those before it is tried next. Scores are random, so that takes 1 + log(1 / top_p) trials on
average. Of tokens whose races are too close, or which their blocks have not stored, exact scores are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.early_launch import wait_for_inputs
from longspan.engine.rank.sampling.edges import pivots
from longspan.engine.rank.sampling.scores import (
    ALL,
    CLOSE,
    INFINITE,
    divided,
    key_of,
    packed_of,
    parameter,
    race_of,
    scaled_of,
    score_of,
    seed_of,
    shifted_logits,
    weight_of,
)

_NOT_SPECIALISED = ["rows"]


@triton.jit
def best_of_blocks(peaks, best, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the largest logit of a row's blocks, those of all of them, the id of the largest: the first of equal ones)."""
    column = tl.arange(0, COLUMNS)
    found = tl.load(peaks + row * splits + column, mask=column < splits, other=float("-inf"))
    peak, at = tl.max(tl.where(found == found, found, float("-inf")), 0, return_indices=True)
    return peak, found, tl.load(best + row * splits + tl.minimum(at, splits - 1))


@triton.jit
def store_peak(result, rows, row, found, peak):  # type: ignore[no-untyped-def]
    """Store the bits of a row's largest logit, or of NaN if one of `found` is."""
    unordered = tl.max((found != found).to(tl.int32), 0) > 0
    bits = tl.where(unordered, float("nan"), peak).to(tl.int32, bitcast=True)
    tl.store(result + rows + row, bits.to(tl.int64))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def winner_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, best, races, tokens, splits, counts, listed, sums,
    result, FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The token of a row: the best that is kept, or the most likely one. Some token, if the row holds NaN."""
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    peak, found, token = best_of_blocks(peaks, best, splits, row, COLUMNS)
    store_peak(result, rows, row, found, peak)
    temperature = parameter(table, 2, rows, row).to(tl.float32)
    if temperature > 0:
        source = (logits, stride, vocabulary, row, peak, temperature, seed_of(table, positions, row))
        floor = parameter(table, 4, rows, row).to(tl.float32)
        race, known, first, second = pivots(races, tokens, splits, row, COLUMNS)
        stop = tl.full((), ALL, tl.int64)
        if FILTERS:
            top_k, top_p = tl.load(table + rows + row), parameter(table, 3, rows, row)
            limited = top_k < vocabulary
            count = tl.load(counts + row, mask=limited, other=0)
            listing = limited & (count <= LISTED)
            entries = (listed + row * LISTED, tl.where(listing, count, vocabulary).to(tl.int32), listing)
            mass, before_first, before_second = _masses(sums + row * 3 * splits, splits, COLUMNS)
            if limited & (top_p < 1.0):
                mass = _mass_of_top_k(source, entries, top_k, SHIFT, BLOCK)
            target = top_p * mass.to(tl.float64)
            trying = True
            while trying:
                tried = _best_before(source, entries, race, known, stop, floor, COLUMNS, SHIFT, BLOCK)
                kept = tried < ALL
                if kept & limited & (top_p > 1.0):
                    kept = _summed(source, entries, (tried >> SHIFT) << SHIFT, True, SHIFT, BLOCK) < top_k
                if kept & (top_p < 1.0):
                    kept = (tried <= first) & (before_first < target) | (tried <= second) & (before_second < target)
                    lost = (tried >= first) & (before_first >= target) | (tried >= second) & (before_second >= target)
                    if limited | ((kept | lost) == False):  # noqa: E712  # `not` needs a constant
                        kept = _summed(source, entries, tried, False, SHIFT, BLOCK).to(tl.float64) < target
                trying = (kept == False) & (tried < ALL)  # noqa: E712
                stop = tried
        else:
            stop = _best_before(source, (None, vocabulary, False), race, known, stop, floor, COLUMNS, SHIFT, BLOCK)
        token = tl.where(stop < ALL, (stop & ((1 << SHIFT) - 1)).to(tl.int32), token)
    tl.store(result + row, tl.minimum(token, vocabulary - 1).to(tl.int64))


@triton.jit
def _masses(sums, splits, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the probability of a row, what of it is before the first token of `pivots`, and before the second)."""
    column = tl.arange(0, COLUMNS)
    whole = tl.sum(tl.load(sums + column, mask=column < splits, other=0), 0)
    first = tl.sum(tl.load(sums + splits + column, mask=column < splits, other=0), 0)
    second = tl.sum(tl.load(sums + 2 * splits + column, mask=column < splits, other=0), 0)
    return whole, first.to(tl.float64), second.to(tl.float64)


@triton.jit
def _best_before(  # type: ignore[no-untyped-def]
    source, entries, race, known, stop, floor, COLUMNS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The token with the best score of those before `stop` that min-p keeps, packed; ALL if there is none.

    Where there is no list, it is in a block whose race is as small as the smallest of blocks whose token is before
    `stop`, or about as small. If that is one block, no other has to be read.
    """
    column = tl.arange(0, COLUMNS)
    inside = (known >= 0) & (known < stop)
    least = tl.min(tl.where(inside, race, float("inf")), 0)
    close = (race <= least * CLOSE) & (race < float("inf"))
    if entries[2]:
        close = column * BLOCK < entries[1]
    tried = tl.min(tl.where(inside & close, known, ALL), 0)
    if (tl.sum(close.to(tl.int32), 0) > 1) | (tried == ALL) | entries[2]:
        tried, alone = _smallest_race(source, entries, column, close, stop, floor, SHIFT, BLOCK)
        if alone == False:  # noqa: E712  # `not` needs a constant
            tried = _best_score(source, entries, column, close, stop, floor, SHIFT, BLOCK)
    return tried


@triton.jit
def _smallest_race(  # type: ignore[no-untyped-def]
    source, entries, column, read, stop, floor, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """(the token of the smallest race of some blocks, packed, or ALL; False if there are others about as small)."""
    least, tried, alone = tl.full((), float("inf"), tl.float32), tl.full((), ALL, tl.int64), tl.full((), 1, tl.int1)
    at = tl.min(tl.where(read, column, column.shape[0]), 0)
    while at < column.shape[0]:
        packed = _entries(source, entries, at * BLOCK, SHIFT, BLOCK)
        scaled, ids = scaled_of(packed, SHIFT), (packed & ((1 << SHIFT) - 1)).to(tl.int32)
        race = race_of(scaled, ids, source[6], tl.full((), 1.0, tl.float32))
        race = tl.where((packed < stop) & (scaled >= floor), race, float("inf"))
        smallest = tl.min(race, 0)
        close = (race <= smallest * CLOSE) & (race < float("inf"))
        if smallest * CLOSE < least:
            alone = tl.sum(close.to(tl.int32), 0) == 1
            tried = tl.min(tl.where(close, packed, ALL), 0)
        elif smallest <= least * CLOSE:
            alone = alone & (smallest == float("inf"))
        least = tl.minimum(least, smallest)
        at = tl.min(tl.where(read & (column > at), column, column.shape[0]), 0)
    return tried, alone


@triton.jit
def _best_score(  # type: ignore[no-untyped-def]
    source, entries, column, read, stop, floor, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The token of some blocks with the best score, packed; ALL if there is none."""
    best, tried = tl.full((), float("-inf"), tl.float64), tl.full((), ALL, tl.int64)
    at = tl.min(tl.where(read, column, column.shape[0]), 0)
    while at < column.shape[0]:
        packed = _entries(source, entries, at * BLOCK, SHIFT, BLOCK)
        scaled, ids = scaled_of(packed, SHIFT), (packed & ((1 << SHIFT) - 1)).to(tl.int32)
        inside = (packed < stop) & (scaled >= floor)
        score = tl.where(inside, score_of(scaled, ids, source[6]), float("-inf"))
        highest = tl.max(score, 0)
        if highest > best:
            best = highest
            tried = tl.min(tl.where(inside & (score == highest), packed, ALL), 0)
        at = tl.min(tl.where(read & (column > at), column, column.shape[0]), 0)
    return tried


@triton.jit
def _entries(source, entries, start, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens number `start` and following of the list, packed; if there is none, of the row. Others are ALL.

    `source` is (logits, their stride, vocabulary, row, largest logit, temperature, seed), and `entries` are (the list,
    how many tokens it or the row has, whether there is a list).
    """
    logits, stride, vocabulary, row, peak, temperature, _seed = source
    place = start + tl.arange(0, BLOCK)
    if entries[2]:
        packed = tl.load(entries[0] + place, mask=place < entries[1], other=ALL)
    else:
        scaled = divided(shifted_logits(logits, stride, row, place, place < vocabulary, peak), temperature)
        packed = tl.where(key_of(scaled) < INFINITE, packed_of(scaled, place, SHIFT), ALL)
    return packed


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    source, entries, stop, COUNTED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """Of the tokens of the list, or of the row, before `stop`, packed: their number, or their probability."""
    found = tl.zeros((BLOCK,), tl.int32 if COUNTED else tl.int64)
    for start in range(0, entries[1], BLOCK):
        packed = _entries(source, entries, start, SHIFT, BLOCK)
        amount = 1 if COUNTED else weight_of(scaled_of(packed, SHIFT))
        found += tl.where(packed < stop, amount, 0)
    return tl.sum(found, 0)


@triton.jit
def _mass_of_top_k(source, entries, top_k, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The probability of the tokens that top-k keeps: its k-th key is found by halving."""
    least = tl.full((), 0, tl.int64)
    most = tl.full((), INFINITE - 1, tl.int64)
    while least < most:
        middle = (least + most) >> 1
        enough = _summed(source, entries, (middle + 1) << SHIFT, True, SHIFT, BLOCK) >= top_k
        most = tl.where(enough, middle, most)
        least = tl.where(enough, least, middle + 1)
    return _summed(source, entries, (least + 1) << SHIFT, False, SHIFT, BLOCK)
