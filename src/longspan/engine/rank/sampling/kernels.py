"""Draw tokens in Triton: at most five launches for a batch, none of which sorts or writes a row of the vocabulary.

It owns these kernels and their launches. Their reference is `gumbel.sample_together`; on every device they give the
tokens of the sampler's code for one row, up to rounding of sums.

A row is cut into blocks, one program each, so that one row fills the device. Rows are read up to three times, from the
second time on from the L2 cache:

1. the largest logit of each block;
2. a histogram of the row's logits: how many tokens and how much probability are in each bin;
3. one program for each row finds the bins in which top-k and top-p end;
4. Gumbel noise. Tokens of bins before these are surely kept: the best of each block is stored. Tokens of these bins,
   which are few, are listed;
5. the best of the row. Which of the listed tokens are kept matters only if one of them is better than all that surely
   are. Then the best is tried: if it is not kept, no token behind it is, and the next best before it is tried. Scores
   are random, so that takes 1 + log(1 / top_p) trials on average even if a row has but one bin.

Probabilities are summed as integers, so a sum does not depend on the order in which programs run. Without filters only
1, 4 and 5 are launched, and for greedy rows only 1 and 5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.attention.rows import unit_stride
from longspan.engine.rank.sampling.bins import (
    BINS,
    INFINITE,
    bin_of,
    first_key,
    key_of,
    parameter,
    place_of,
    scaled_logits,
    score_of,
    weight_of,
)
from longspan.engine.rank.sampling.gumbel import DrawParameters

BLOCK = tl.constexpr(1024)  # tokens of a program
LISTED = 8192  # tokens that fit the list of the fourth kernel; of a row with more the whole vocabulary is read instead
_TOTAL = tl.constexpr(2 * BINS.value)  # behind masses and counts of bins: how many tokens are listed
_WIDTH = tl.constexpr(_TOTAL.value + 1)  # of a row's histogram
_ENDS = tl.constexpr(6)  # numbers that `_ends_kernel` stores of a row
_ALL = tl.constexpr((1 << 63) - 1)
_WARPS, _ROW_WARPS = 4, 8
_NOT_SPECIALISED = ["rows"]


def draw(
    logits: Tensor, parameters: DrawParameters | None, positions: Tensor | None, listed_tokens: int = LISTED
) -> Tensor:
    """Draw one token for each of R rows of `logits` [R, vocab], fp32 or narrower, at `positions` int64 [R].

    Returns `gumbel.outcome`. Without parameters all rows are greedy: they get the lowest of their most likely tokens.
    """
    logits = unit_stride(logits)
    rows, vocabulary = logits.shape
    result = torch.empty((2, rows), dtype=torch.int64, device=logits.device)
    if not rows:
        return result
    splits = triton.cdiv(vocabulary, BLOCK.value)
    columns = triton.next_power_of_2(splits)
    peaks = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    best = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    size, grid = (logits, logits.stride(0), vocabulary), (rows, splits)
    filters = parameters is not None and parameters.filters
    histogram = torch.empty((rows, _WIDTH.value), dtype=torch.int64, device=logits.device) if filters else None
    cleared = triton.next_power_of_2(triton.cdiv(_WIDTH.value, splits)) if filters else 1
    _peaks_kernel[grid](*size, peaks, best, histogram, FILTERS=filters, CLEARED=cleared, num_warps=_WARPS)
    if parameters is None or positions is None:
        _greedy_kernel[(rows,)](peaks, best, splits, result, rows, COLUMNS=columns, num_warps=_WARPS)
        return result
    tables, ends, listed, shift = (parameters.table, positions, rows), None, None, 1
    if filters:
        shift = max(1, (vocabulary - 1).bit_length())
        listed = torch.empty((rows, listed_tokens), dtype=torch.int64, device=logits.device)
        ends = torch.empty((rows, _ENDS.value), dtype=torch.int64, device=logits.device)
        _histogram_kernel[grid](*size, *tables, peaks, histogram, COLUMNS=columns, num_warps=_WARPS)
        _ends_kernel[(rows,)](vocabulary, *tables, histogram, ends, num_warps=_ROW_WARPS)
    scores = torch.empty((2, rows, splits), dtype=torch.float64, device=logits.device)
    drawn = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    sizes = {"FILTERS": filters, "COLUMNS": columns, "SHIFT": shift, "LISTED": listed_tokens if filters else 1}
    found = (histogram, ends, listed, scores, drawn)
    _noise_kernel[grid](*size, *tables, peaks, *found, **sizes, num_warps=_WARPS)
    warps = _ROW_WARPS if filters else _WARPS
    _winner_kernel[(rows,)](*size, *tables, peaks, *found, best, splits, result, **sizes, num_warps=warps)
    return result


@triton.jit
def _peak(peaks, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a row."""
    column = tl.arange(0, COLUMNS)
    return tl.max(tl.load(peaks + row * splits + column, mask=column < splits, other=float("-inf")), 0)


@triton.jit
def _peaks_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, peaks, best, histogram, FILTERS: tl.constexpr, CLEARED: tl.constexpr
):
    """The largest logit of a block, NaN if it holds one, and its lowest id. Clears a part of the row's histogram."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    if FILTERS:
        place = split * CLEARED + tl.arange(0, CLEARED)
        tl.store(histogram + row * _WIDTH + place, tl.zeros((CLEARED,), tl.int64), mask=place < _WIDTH)
    peak, at = tl.max(values, 0, return_indices=True)
    unordered = tl.max((values != values).to(tl.int32), 0) > 0
    tl.store(peaks + row * splits + split, tl.where(unordered, float("nan"), peak))
    tl.store(best + row * splits + split, tl.minimum(split * BLOCK + at, vocabulary - 1))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _histogram_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, histogram, COLUMNS: tl.constexpr
):
    """Add a block to the row's histogram: probabilities if the row has top-p, and counts if it has top-k."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_p = parameter(table, 2, rows, row).to(tl.float32), parameter(table, 3, rows, row)
    limited = tl.load(table + rows + row) < vocabulary
    if (temperature > 0) & (limited | (top_p < 1.0)):
        ids = split * BLOCK + tl.arange(0, BLOCK)
        valid = ids < vocabulary
        peak = _peak(peaks, splits, row, COLUMNS)
        key = key_of(scaled_logits(logits, stride, row, ids, valid, peak, temperature))
        here = histogram + row * _WIDTH + place_of(bin_of(key))
        if top_p < 1.0:
            weight = weight_of(key)
            tl.atomic_add(here, weight, mask=valid & (weight > 0), sem="relaxed")
        if limited:
            one = tl.full((BLOCK,), 1, tl.int64)
            tl.atomic_add(here + BINS, one, mask=valid & (key < INFINITE), sem="relaxed")


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _ends_kernel(vocabulary, table, positions, rows, histogram, ends):  # type: ignore[no-untyped-def]
    """The bins in which a row's top-k and top-p may end, and what is before them.

    These are: the bin of the k-th token, the first and the last bin where top-p may end, tokens before the bin of the
    k-th, probability before it, and probability before the first bin of top-p. Where a filter is off its bins are
    beyond the last. Where top-p ends depends on how much of the bin of the k-th token is kept: hence two bins.
    """
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(table + rows + row), parameter(table, 3, rows, row)
    number = tl.arange(0, BINS)
    here = histogram + row * _WIDTH + place_of(number)
    masses = tl.load(here)
    reached = tl.cumsum(masses, 0).to(tl.float64)
    k_bin, count_before = tl.full((), BINS, tl.int32), tl.full((), 0, tl.int64)
    mass_before_k = tl.sum(masses, 0)
    mass_through_k = mass_before_k
    if top_k < vocabulary:
        counts = tl.load(here + BINS)
        k_bin = tl.sum((tl.cumsum(counts, 0) < top_k).to(tl.int32), 0)
        count_before = tl.sum(tl.where(number < k_bin, counts, 0), 0)
        mass_before_k = tl.sum(tl.where(number < k_bin, masses, 0), 0)
        mass_through_k = tl.sum(tl.where(number <= k_bin, masses, 0), 0)
    first = tl.sum((reached < top_p * mass_before_k.to(tl.float64)).to(tl.int32), 0)
    last = tl.sum((reached < top_p * mass_through_k.to(tl.float64)).to(tl.int32), 0)
    last = tl.minimum(last, k_bin)
    first = tl.where(top_p > 1.0, BINS, tl.minimum(first, last))
    store = ends + row * _ENDS
    tl.store(store, k_bin.to(tl.int64))
    tl.store(store + 1, first.to(tl.int64))
    tl.store(store + 2, last.to(tl.int64))
    tl.store(store + 3, count_before)
    tl.store(store + 4, mass_before_k)
    tl.store(store + 5, tl.sum(tl.where(number < first, masses, 0), 0))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _noise_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, histogram, ends, listed, scores, drawn,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The best token of a block after Gumbel noise among those that are surely kept, and its score.

    Tokens of bins where filters end are listed as key · 2^SHIFT + id, in any order, and the best score among them is
    stored too.
    """
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = parameter(table, 2, rows, row).to(tl.float32)
    if temperature > 0:
        ids = split * BLOCK + tl.arange(0, BLOCK)
        kept = ids < vocabulary
        scaled = scaled_logits(logits, stride, row, ids, kept, _peak(peaks, splits, row, COLUMNS), temperature)
        score = score_of(scaled, ids, table, positions, row)
        here = scores + row * splits + split
        if FILTERS:
            top_p, limited = parameter(table, 3, rows, row), tl.load(table + rows + row) < vocabulary
            key = key_of(scaled)
            number = bin_of(key)
            filtered = limited | (top_p < 1.0)
            end = ends + row * _ENDS
            k_bin = tl.load(end, mask=filtered, other=BINS)
            first = tl.load(end + 1, mask=filtered, other=BINS)
            last = tl.load(end + 2, mask=filtered, other=0)
            wanted = kept & (key < INFINITE) & ((number == k_bin) | ((number >= first) & (number <= last)))
            count = tl.sum(wanted.to(tl.int32), 0)
            allowed = kept & (scaled >= parameter(table, 4, rows, row).to(tl.float32))
            if count > 0:
                start = tl.atomic_add(histogram + row * _WIDTH + _TOTAL, count.to(tl.int64), sem="relaxed")
                place = start + tl.cumsum(wanted.to(tl.int32), 0) - 1
                packed = (key << SHIFT) | ids
                tl.store(listed + row * LISTED + place, packed, mask=wanted & (place < LISTED))
            perhaps = wanted & allowed & (number <= tl.where(top_p > 1.0, k_bin, last))
            tl.store(here + rows.to(tl.int64) * splits, tl.max(tl.where(perhaps, score, float("-inf")), 0))
            kept = allowed & (number < tl.minimum(first, k_bin))
        best, at = tl.max(tl.where(kept, score, float("-inf")), 0, return_indices=True)
        tl.store(here, best)
        tl.store(drawn + row * splits + split, split * BLOCK + at)


@triton.jit
def _best_of_blocks(values, ids, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the largest value of a row's blocks, all of them, the id of the largest: the first of equal ones)."""
    column = tl.arange(0, COLUMNS)
    found = tl.load(values + row * splits + column, mask=column < splits, other=float("-inf"))
    value, at = tl.max(found, 0, return_indices=True)
    return value, found, tl.load(ids + row * splits + tl.minimum(at, splits - 1))


@triton.jit
def _store_peak(result, rows, row, found, peak):  # type: ignore[no-untyped-def]
    """Store the bits of a row's largest logit, or of NaN if one of `found` is."""
    unordered = tl.max((found != found).to(tl.int32), 0) > 0
    bits = tl.where(unordered, float("nan"), peak).to(tl.int32, bitcast=True)
    tl.store(result + rows + row, bits.to(tl.int64))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _greedy_kernel(peaks, best, splits, result, rows, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The most likely token of a row."""
    row = tl.program_id(0).to(tl.int64)
    peak, found, token = _best_of_blocks(peaks, best, splits, row, COLUMNS)
    tl.store(result + row, token.to(tl.int64))
    _store_peak(result, rows, row, found, peak)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _winner_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, histogram, ends, listed, scores, drawn,
    best, splits, result, FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The token of a row: the best after noise, or the most likely one. Some token, if the row holds NaN."""
    row = tl.program_id(0).to(tl.int64)
    peak, found, token = _best_of_blocks(peaks, best, splits, row, COLUMNS)
    temperature = parameter(table, 2, rows, row).to(tl.float32)
    if temperature > 0:
        score, _scores, token = _best_of_blocks(scores, drawn, splits, row, COLUMNS)
        if FILTERS:
            column = tl.arange(0, COLUMNS)
            others = scores + (rows.to(tl.int64) + row) * splits + column
            other = tl.max(tl.load(others, mask=column < splits, other=float("-inf")), 0)
            if (other >= score) & (other > float("-inf")):
                total = tl.load(histogram + row * _WIDTH + _TOTAL)
                source = (logits, stride, vocabulary, peak, temperature, listed, total)
                token = _try_listed(row, source, table, positions, rows, ends, score, token, SHIFT, LISTED)
    tl.store(result + row, tl.minimum(token, vocabulary - 1).to(tl.int64))
    _store_peak(result, rows, row, found, peak)


@triton.jit
def _entries(row, source, start, SHIFT: tl.constexpr, LISTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens number `start` to `start` + BLOCK of the list, packed; if it is too long, of the row. Others are _ALL.

    `source` is (logits, their stride, vocabulary, largest logit, temperature, list, tokens that it should hold).
    """
    logits, stride, vocabulary, peak, temperature, listed, total = source
    place = start + tl.arange(0, BLOCK)
    if total <= LISTED:
        packed = tl.load(listed + row * LISTED + place, mask=place < total, other=_ALL)
    else:
        valid = place < vocabulary
        key = key_of(scaled_logits(logits, stride, row, place, valid, peak, temperature))
        packed = tl.where(valid & (key < INFINITE), (key << SHIFT) | place, _ALL)
    return packed


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    row, source, number, low, stop, COUNTED: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr
):
    """Of the listed tokens from `low` to before `stop`, both packed: their number, or their probability."""
    found = tl.full((), 0, tl.int64)
    for start in range(0, number, BLOCK):
        packed = _entries(row, source, start, SHIFT, LISTED)
        inside = (packed >= low) & (packed < stop)
        amount = tl.full((BLOCK,), 1, tl.int64) if COUNTED else weight_of((packed >> SHIFT) & 0x7FFFFFFF)
        found += tl.sum(tl.where(inside, amount, 0), 0)
    return found


@triton.jit
def _mass_of_top_k(  # type: ignore[no-untyped-def]
    row, source, number, k_bin, wanted, SHIFT: tl.constexpr, LISTED: tl.constexpr
):
    """The probability in the bin of the k-th token that top-k keeps, which is `wanted` tokens behind its beginning."""
    low = first_key(k_bin)
    least, most = low, first_key(k_bin + 1) - 1
    while least < most:
        middle = (least + most) >> 1
        count = _summed(row, source, number, low << SHIFT, (middle + 1) << SHIFT, True, SHIFT, LISTED)
        most = tl.where(count >= wanted, middle, most)
        least = tl.where(count >= wanted, least, middle + 1)
    return _summed(row, source, number, low << SHIFT, (least + 1) << SHIFT, False, SHIFT, LISTED)


@triton.jit
def _best_listed(  # type: ignore[no-untyped-def]
    row, source, number, low, stop, table, positions, rows, SHIFT: tl.constexpr, LISTED: tl.constexpr
):
    """Of the listed tokens from `low` to before `stop` that min-p keeps: the best score, and its token, packed."""
    floor = parameter(table, 4, rows, row).to(tl.float32)
    best, token = tl.full((), float("-inf"), tl.float64), tl.full((), _ALL, tl.int64)
    for start in range(0, number, BLOCK):
        packed = _entries(row, source, start, SHIFT, LISTED)
        scaled = -((packed >> SHIFT) & 0x7FFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        ids = (packed & ((1 << SHIFT) - 1)).to(tl.int32)
        inside = (packed >= low) & (packed < stop) & (scaled >= floor)
        found = tl.where(inside, score_of(scaled, ids, table, positions, row), float("-inf"))
        highest = tl.max(found, 0)
        if highest > best:
            best = highest
            token = tl.min(tl.where(inside & (found == highest), packed, _ALL), 0)
    return best, token


@triton.jit
def _try_listed(  # type: ignore[no-untyped-def]
    row, source, table, positions, rows, ends, score, token, SHIFT: tl.constexpr, LISTED: tl.constexpr
):
    """The best of `token`, which has this score, and of those listed tokens that are kept.

    Top-k keeps all tokens of the k-th's key; top-p ends between two tokens of one key too, and keeps the lower ids.
    """
    top_k, top_p, vocabulary = tl.load(table + rows + row), parameter(table, 3, rows, row), source[2]
    limited, total = top_k < vocabulary, source[6]
    number = tl.where(total <= LISTED, total, vocabulary)
    end = ends + row * _ENDS
    k_bin, first, last = tl.load(end).to(tl.int32), tl.load(end + 1).to(tl.int32), tl.load(end + 2).to(tl.int32)
    count_before, kept_mass, mass_before = tl.load(end + 3), tl.load(end + 4), tl.load(end + 5)
    # where tokens that may be kept begin and end
    low, stop = first_key(first) << SHIFT, first_key(last + 1) << SHIFT
    if top_p > 1.0:
        low, stop = first_key(k_bin) << SHIFT, first_key(k_bin + 1) << SHIFT
    elif limited & (k_bin < BINS):
        kept_mass += _mass_of_top_k(row, source, number, k_bin, top_k - count_before, SHIFT, LISTED)
    target = top_p * kept_mass.to(tl.float64)
    trying = True
    while trying:
        best, tried = _best_listed(row, source, number, low, stop, table, positions, rows, SHIFT, LISTED)
        trying = best > score
        if trying:
            if top_p > 1.0:
                before = _summed(row, source, number, low, (tried >> SHIFT) << SHIFT, True, SHIFT, LISTED)
                kept = count_before + before < top_k
            else:
                before = _summed(row, source, number, low, tried, False, SHIFT, LISTED)
                kept = (mass_before + before).to(tl.float64) < target
            token = tl.where(kept, (tried & ((1 << SHIFT) - 1)).to(tl.int32), token)
            trying = kept == False  # noqa: E712  # `not` needs a constant
            stop = tried
    return token
