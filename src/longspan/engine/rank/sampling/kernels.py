"""Draw tokens in Triton: at most six launches for a batch, none of which sorts or writes a row of the vocabulary.

It owns these kernels and their launches. Their reference is `gumbel.sample_together`; on every device they give the
tokens of the sampler's code for one row, up to rounding of sums.

A row is cut into blocks, one program each, so that one row fills the device. Rows are read up to five times, from the
second time on from the L2 cache:

1. the largest logit of each block;
2. a histogram of the row's logits: how many tokens and how much probability are in each bin;
3. the tokens of the bins in which top-k and top-p end, which are few;
4. one program for each row finds among these the last token that is kept;
5. Gumbel noise, and the best of the kept tokens of each block;
6. the best of the row.

Probabilities are summed as integers, so a sum does not depend on the order in which programs run. Without filters only
1, 5 and 6 are launched, and for greedy rows only 1 and 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.attention.rows import unit_stride
from longspan.engine.rank.sampling import random_numbers
from longspan.engine.rank.sampling.gumbel import DrawParameters

BLOCK = tl.constexpr(1024)  # tokens of a program
LISTED = 8192  # tokens that fit the list of the third kernel; a row with more is read again and again
_LOOP = tl.constexpr(4096)  # tokens of a row that are read at once
_BINS = tl.constexpr(2048)  # bins of a row, of which the last few are not used
_GAMMA = tl.constexpr(random_numbers.GAMMA)
_FIRST = tl.constexpr(random_numbers.FIRST)
_SECOND = tl.constexpr(random_numbers.SECOND)
_ONE = tl.constexpr(float(1 << 44))  # the integer that stands for probability 1: 2^18 of them fit into 63 bits
_INFINITE = tl.constexpr(0x7F800000)  # the key of -inf
_ALL = tl.constexpr((1 << 63) - 1)
# Bins are 1/128 of an octave wide for logits that are 2^-8 to 2^7 below the largest, and whole octaves below these.
_LOW = tl.constexpr((127 - 8) << 7)
_HIGH = tl.constexpr((127 + 7) << 7)
_FINE = tl.constexpr(1921)  # the first bin of a whole octave
_WARPS, _ROW_WARPS = 4, 16
_NOT_SPECIALISED = ["rows"]


def draw(
    logits: Tensor, parameters: DrawParameters | None, positions: Tensor | None, listed_tokens: int = LISTED
) -> Tensor:
    """Draw one token for each of R rows of `logits` fp32 [R, vocab], at `positions` int64 [R].

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
    histogram = torch.empty((rows, 2 * _BINS.value + 1), dtype=torch.int64, device=logits.device) if filters else None
    _peaks_kernel[grid](*size, peaks, best, histogram, FILTERS=filters, num_warps=_WARPS)
    if parameters is None or positions is None:
        _greedy_kernel[(rows,)](peaks, best, splits, result, rows, COLUMNS=columns, num_warps=_WARPS)
        return result
    tables, limits = (parameters.table, positions, rows), None
    if filters:
        shift = max(1, (vocabulary - 1).bit_length())
        listed = torch.empty((rows, listed_tokens), dtype=torch.int64, device=logits.device)
        limits = torch.empty(rows, dtype=torch.int64, device=logits.device)
        _histogram_kernel[grid](*size, *tables, peaks, histogram, COLUMNS=columns, num_warps=_WARPS)
        _collect_kernel[grid](
            *size, *tables, peaks, histogram, listed,
            COLUMNS=columns, SHIFT=shift, LISTED=listed_tokens, num_warps=_WARPS,
        )  # fmt: skip
        _limit_kernel[(rows,)](
            *size, *tables, peaks, histogram, listed, limits, splits,
            COLUMNS=columns, SHIFT=shift, LISTED=listed_tokens, num_warps=_ROW_WARPS,
        )  # fmt: skip
    scores = torch.empty((rows, splits), dtype=torch.float64, device=logits.device)
    drawn = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    _noise_kernel[grid](
        *size, *tables, peaks, limits, scores, drawn,
        FILTERS=filters, COLUMNS=columns, SHIFT=shift if filters else 1, num_warps=_WARPS,
    )  # fmt: skip
    _winner_kernel[(rows,)](
        *tables, peaks, best, scores, drawn, splits, vocabulary, result, COLUMNS=columns, num_warps=_WARPS
    )
    return result


@triton.jit
def _float(table, field, rows, row):  # type: ignore[no-untyped-def]
    """A float of a row's parameters."""
    return tl.load(table + field * rows + row).to(tl.float64, bitcast=True)


@triton.jit
def _peak(peaks, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a row."""
    column = tl.arange(0, COLUMNS)
    return tl.max(tl.load(peaks + row * splits + column, mask=column < splits, other=float("-inf")), 0)


@triton.jit
def _scaled(logits, stride, row, ids, valid, peak, temperature):  # type: ignore[no-untyped-def]
    """Logits shifted so that the largest is 0, and divided by the temperature: rounded as on the CPU."""
    values = tl.load(logits + row * stride + ids, mask=valid, other=float("-inf"))
    return tl.div_rn(values - peak, tl.zeros_like(values) + temperature)


@triton.jit
def _key(scaled):  # type: ignore[no-untyped-def]
    """Int64 that orders scaled logits, the largest first: the bits of their magnitude."""
    return (scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _weight(key):  # type: ignore[no-untyped-def]
    """The probability relative to that of the best token, as an integer."""
    scaled = -key.to(tl.int32).to(tl.float32, bitcast=True)
    return (tl.exp(scaled.to(tl.float64)) * _ONE).to(tl.int64)


@triton.jit
def _bin(key):  # type: ignore[no-untyped-def]
    """The number of the bin of a key."""
    prefix = (key >> 16).to(tl.int32)
    fine = tl.maximum(prefix - _LOW + 1, 0)
    return tl.where(prefix < _HIGH, fine, _FINE + ((prefix - _HIGH) >> 7))


@triton.jit
def _first_key(number):  # type: ignore[no-untyped-def]
    """The first key of a bin."""
    prefix = tl.where(number <= _FINE, _LOW + number - 1, _HIGH + (number - _FINE) * 128)
    return tl.where(number <= 0, 0, prefix.to(tl.int64) << 16)


@triton.jit
def _ends(histogram, row, top_k, top_p):  # type: ignore[no-untyped-def]
    """The bins in which a row's top-k and top-p may end, and what is before them.

    Returns (bin of the k-th token, first and last bin where top-p may end, tokens before the bin of the k-th,
    probability before it, probability before the first bin of top-p). Where a filter is off its bins are beyond the
    last. Where top-p ends depends on how much of the bin of the k-th token is kept: hence two bins.
    """
    number = tl.arange(0, _BINS)
    here = histogram + row * (2 * _BINS + 1)
    masses = tl.load(here + number)
    counts = tl.load(here + _BINS + number)
    mass_until = tl.cumsum(masses, 0)
    k_bin = tl.sum((tl.cumsum(counts, 0) < top_k).to(tl.int32), 0)
    count_before = tl.sum(tl.where(number < k_bin, counts, 0), 0)
    mass_before_k = tl.sum(tl.where(number < k_bin, masses, 0), 0)
    mass_through_k = tl.sum(tl.where(number <= k_bin, masses, 0), 0)
    reached = mass_until.to(tl.float64)
    first = tl.sum((reached < top_p * mass_before_k.to(tl.float64)).to(tl.int32), 0)
    last = tl.sum((reached < top_p * mass_through_k.to(tl.float64)).to(tl.int32), 0)
    last = tl.minimum(last, k_bin)
    first = tl.where(top_p > 1.0, _BINS, tl.minimum(first, last))
    mass_before_p = tl.sum(tl.where(number < first, masses, 0), 0)
    return k_bin, first, last, count_before, mass_before_k, mass_before_p


@triton.jit
def _peaks_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, peaks, best, histogram, FILTERS: tl.constexpr
):
    """The largest logit of a block, NaN if it holds one, and its lowest id. Clears the row's histogram."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + ids, mask=ids < vocabulary, other=float("-inf"))
    peak, at = tl.max(values, 0, return_indices=True)
    unordered = tl.max((values != values).to(tl.int32), 0) > 0
    tl.store(peaks + row * splits + split, tl.where(unordered, float("nan"), peak))
    tl.store(best + row * splits + split, tl.minimum(split * BLOCK + at, vocabulary - 1))
    if FILTERS:  # noqa: SIM102  # it is known when the kernel is compiled, and `split` is not
        if split == 0:
            here = histogram + row * (2 * _BINS + 1)
            tl.store(here + tl.arange(0, 2 * _BINS), tl.zeros((2 * _BINS,), tl.int64))
            tl.store(here + 2 * _BINS, 0)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _histogram_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, histogram, COLUMNS: tl.constexpr
):
    """Add a block to the row's histogram: probabilities if the row has top-p, and counts if it has top-k."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_p = _float(table, 2, rows, row).to(tl.float32), _float(table, 3, rows, row)
    limited = tl.load(table + rows + row) < vocabulary
    if (temperature > 0) & (limited | (top_p < 1.0)):
        ids = split * BLOCK + tl.arange(0, BLOCK)
        valid = ids < vocabulary
        peak = _peak(peaks, splits, row, COLUMNS)
        key = _key(_scaled(logits, stride, row, ids, valid, peak, temperature))
        here = histogram + row * (2 * _BINS + 1) + _bin(key)
        if top_p < 1.0:
            weight = _weight(key)
            tl.atomic_add(here, weight, mask=valid & (weight > 0), sem="relaxed")
        if limited:
            one = tl.full((BLOCK,), 1, tl.int64)
            tl.atomic_add(here + _BINS, one, mask=valid & (key < _INFINITE), sem="relaxed")


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _collect_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, histogram, listed,
    COLUMNS: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """List a block's tokens of the bins where filters end, as key · 2^SHIFT + id, in any order."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_p = _float(table, 2, rows, row).to(tl.float32), _float(table, 3, rows, row)
    top_k = tl.load(table + rows + row)
    if (temperature > 0) & ((top_k < vocabulary) | (top_p < 1.0)):
        k_bin, first, last, _count, _mass_k, _mass_p = _ends(histogram, row, top_k, top_p)
        ids = split * BLOCK + tl.arange(0, BLOCK)
        valid = ids < vocabulary
        peak = _peak(peaks, splits, row, COLUMNS)
        key = _key(_scaled(logits, stride, row, ids, valid, peak, temperature))
        number = _bin(key)
        wanted = valid & (key < _INFINITE) & ((number == k_bin) | ((number >= first) & (number <= last)))
        wanted_count = tl.sum(wanted.to(tl.int32), 0)
        if wanted_count > 0:
            total = histogram + row * (2 * _BINS + 1) + 2 * _BINS
            start = tl.atomic_add(total, wanted_count.to(tl.int64), sem="relaxed")
            place = start + tl.cumsum(wanted.to(tl.int32), 0) - 1
            packed = (key << SHIFT) | ids
            tl.store(listed + row * LISTED + place, packed, mask=wanted & (place < LISTED))


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    logits, stride, row, vocabulary, peak, temperature, low, last, COUNTED: tl.constexpr, SHIFT: tl.constexpr
):
    """Of a row's tokens from `low` to `last`, both packed: their number, or their probability."""
    total = tl.full((), 0, tl.int64)
    for start in range(0, vocabulary, _LOOP):
        ids = start + tl.arange(0, _LOOP)
        valid = ids < vocabulary
        key = _key(_scaled(logits, stride, row, ids, valid, peak, temperature))
        packed = (key << SHIFT) | ids
        amount = tl.full((_LOOP,), 1, tl.int64) if COUNTED else _weight(key)
        total += tl.sum(tl.where(valid & (packed >= low) & (packed <= last), amount, 0), 0)
    return total


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _limit_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, histogram, listed, limits, splits,
    COLUMNS: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The last token, as key · 2^SHIFT + id, that top-k and top-p keep of a row.

    Top-k keeps all tokens of the k-th's key; top-p ends between two tokens of one key too, and keeps the lower ids.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature, top_p = _float(table, 2, rows, row).to(tl.float32), _float(table, 3, rows, row)
    top_k = tl.load(table + rows + row)
    limit = tl.full((), _ALL, tl.int64)
    if (temperature > 0) & ((top_k < vocabulary) | (top_p < 1.0)):
        k_bin, first, last, count_before, mass_k, mass_p = _ends(histogram, row, top_k, top_p)
        total = tl.load(histogram + row * (2 * _BINS + 1) + 2 * _BINS)
        fits = total <= LISTED
        peak = _peak(peaks, splits, row, COLUMNS)
        place = tl.arange(0, LISTED)
        packed = tl.load(listed + row * LISTED + place, mask=place < tl.where(fits, total, 0), other=_ALL)
        weight = tl.where(packed < _ALL, _weight((packed >> SHIFT) & 0x7FFFFFFF), 0)
        k_low = _first_key(k_bin) << SHIFT
        if (top_k < vocabulary) & (k_bin < _BINS):
            low, high = _first_key(k_bin), _first_key(k_bin + 1) - 1
            while low < high:
                middle = (low + high) >> 1
                if fits:
                    inside = (packed >= k_low) & (packed < ((middle + 1) << SHIFT))
                    count = tl.sum(inside.to(tl.int64), 0)
                else:
                    until = ((middle + 1) << SHIFT) - 1
                    count = _summed(logits, stride, row, vocabulary, peak, temperature, k_low, until, True, SHIFT)
                enough = count_before + count >= top_k
                high = tl.where(enough, middle, high)
                low = tl.where(enough, low, middle + 1)
            limit = ((low + 1) << SHIFT) - 1
        if top_p < 1.0:
            p_low = _first_key(first) << SHIFT
            low, high = p_low, tl.minimum((_first_key(last + 1) << SHIFT) - 1, limit)
            if fits:
                kept = mass_k + tl.sum(tl.where((packed >= k_low) & (packed <= limit), weight, 0), 0)
            else:
                kept = mass_k + _summed(logits, stride, row, vocabulary, peak, temperature, k_low, limit, False, SHIFT)
            target = top_p * kept.to(tl.float64)
            while low < high:
                middle = (low + high) >> 1
                if fits:
                    mass = tl.sum(tl.where((packed >= p_low) & (packed <= middle), weight, 0), 0)
                else:
                    mass = _summed(logits, stride, row, vocabulary, peak, temperature, p_low, middle, False, SHIFT)
                enough = (mass_p + mass).to(tl.float64) >= target
                high = tl.where(enough, middle, high)
                low = tl.where(enough, low, middle + 1)
            limit = low
    tl.store(limits + row, limit)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _noise_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, limits, scores, drawn,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The best token of a block after Gumbel noise, and its score; see `random_numbers.uniform`."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = _float(table, 2, rows, row).to(tl.float32)
    if temperature > 0:
        ids = split * BLOCK + tl.arange(0, BLOCK)
        kept = ids < vocabulary
        scaled = _scaled(logits, stride, row, ids, kept, _peak(peaks, splits, row, COLUMNS), temperature)
        if FILTERS:
            packed = (_key(scaled) << SHIFT) | ids
            kept &= (packed <= tl.load(limits + row)) & (scaled >= _float(table, 4, rows, row).to(tl.float32))
        seed = (tl.load(table + row) ^ tl.load(positions + row)).to(tl.uint64, bitcast=True)
        start = _finalised(seed + _GAMMA)
        number = _finalised((ids + 1).to(tl.uint64) * _GAMMA + start)
        uniform = ((number >> 11).to(tl.float64) + 0.5) * (1.0 / (1 << 53))
        score = tl.where(kept, scaled.to(tl.float64) - tl.log(-tl.log(uniform)), float("-inf"))
        best, at = tl.max(score, 0, return_indices=True)
        tl.store(scores + row * splits + split, best)
        tl.store(drawn + row * splits + split, split * BLOCK + at)


@triton.jit
def _finalised(state):  # type: ignore[no-untyped-def]
    """See `random_numbers`: shifts of unsigned integers are logical, and products wrap."""
    state = (state ^ (state >> 30)) * _FIRST
    state = (state ^ (state >> 27)) * _SECOND
    return state ^ (state >> 31)


@triton.jit
def _best_of_blocks(values, ids, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest value of a row's blocks, and its id; the first of equal ones."""
    column = tl.arange(0, COLUMNS)
    found = tl.load(values + row * splits + column, mask=column < splits, other=float("-inf"))
    value, at = tl.max(found, 0, return_indices=True)
    return value, found, tl.load(ids + row * splits + tl.minimum(at, splits - 1))


@triton.jit
def _store_peak(result, rows, row, found, peak):  # type: ignore[no-untyped-def]
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
    table, positions, rows, peaks, best, scores, drawn, splits, vocabulary, result, COLUMNS: tl.constexpr
):
    """The token of a row: the best after noise, or the most likely one. Some token, if the row holds NaN."""
    row = tl.program_id(0).to(tl.int64)
    peak, found, token = _best_of_blocks(peaks, best, splits, row, COLUMNS)
    if _float(table, 2, rows, row) > 0:
        _score, _scores, token = _best_of_blocks(scores, drawn, splits, row, COLUMNS)
    tl.store(result + row, tl.minimum(token, vocabulary - 1).to(tl.int64))
    _store_peak(result, rows, row, found, peak)
