"""Where top-k and top-p may end, in Triton: how much probability is before two tokens, or a list of few tokens.

It owns the third launch of `kernels.py`, and what of a row bounds its k-th logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.early_launch import wait_for_inputs
from longspan.engine.rank.sampling.scores import (
    INFINITE,
    divided,
    key_of,
    packed_of,
    parameter,
    shifted_logits,
    weight_of,
)

MOST = tl.constexpr(512)  # tokens that a program lists: if it had more, the row is taken as one that does not fit
_NOT_SPECIALISED = ["rows"]


@triton.jit
def peak_of(peaks, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a row."""
    column = tl.arange(0, COLUMNS)
    return tl.max(tl.load(peaks + row * splits + column, mask=column < splits, other=float("-inf")), 0)


@triton.jit
def store_bound(groups, number, top_k, bound, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A logit that at least `top_k` tokens reach: the k-th of the largest of `number` groups. -inf if they are fewer.

    Found bit by bit, as an integer with the same order.
    """
    place = tl.arange(0, GROUPS)
    bits = tl.load(groups + place, mask=place < number, other=float("-inf")).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    found, step = tl.full((), -(1 << 31), tl.int64), tl.full((), 1 << 31, tl.int64)
    while step > 0:
        tried = found + step
        found = tl.where(tl.sum((order >= tried).to(tl.int32), 0) >= top_k, tried, found)
        step >>= 1
    least = found.to(tl.int32)
    value = tl.where(least < 0, least ^ 0x7FFFFFFF, least).to(tl.float32, bitcast=True)
    tl.store(bound, tl.where(value == value, value, float("-inf")))


@triton.jit
def pivots(races, tokens, splits, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(each block's race, each block's token, the best of these, the best of those before it); 0 where none is.

    Tokens are packed. Another token of a block may be better than the last. 0 is before every token but itself.
    """
    column = tl.arange(0, COLUMNS)
    race = tl.load(races + row * splits + column, mask=column < splits, other=float("inf"))
    token = tl.load(tokens + row * splits + column, mask=column < splits, other=-1)
    here = tokens + row * splits
    first = _best_token(here, race, token >= 0, splits, COLUMNS)
    return race, token, first, _best_token(here, race, (token >= 0) & (token < first), splits, COLUMNS)


@triton.jit
def _best_token(tokens, race, wanted, splits, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token of the smallest race. Races are compared as integers, which a warp reduces by one instruction."""
    column = tl.arange(0, COLUMNS)
    bits = tl.where(wanted, race, float("inf")).to(tl.int32, bitcast=True)
    at = tl.min(tl.where(wanted & (bits == tl.min(bits, 0)), column, COLUMNS), 0)
    return tl.load(tokens + at, mask=at < splits, other=0)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def edges_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, bounds, races, tokens, counts, listed, sums,
    COLUMNS: tl.constexpr, SHIFT: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For top-p alone: the probability of a block, and how much of it is before each of two tokens.

    For top-k: list the tokens that may be among the first k, in any order.
    """
    wait_for_inputs(EARLY)
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_p = parameter(table, 2, rows, row).to(tl.float32), parameter(table, 3, rows, row)
    limited = tl.load(table + rows + row) < vocabulary
    if (temperature > 0) & (limited | (top_p < 1.0)):
        peak = peak_of(peaks, splits, row, COLUMNS)
        ids = split * BLOCK + tl.arange(0, BLOCK)
        scaled = divided(shifted_logits(logits, stride, row, ids, ids < vocabulary, peak), temperature)
        key = key_of(scaled)
        if limited:
            wanted = (scaled >= divided(tl.load(bounds + row) - peak, temperature)) & (key < INFINITE)
            count = tl.sum(wanted.to(tl.int32), 0)
            if count > MOST:
                tl.atomic_add(counts + row, LISTED + 1, sem="relaxed")
            elif count > 0:
                place = tl.atomic_add(counts + row + tl.zeros_like(ids), 1, mask=wanted, sem="relaxed")
                packed = packed_of(scaled, ids, SHIFT)
                tl.store(listed + row * LISTED + place, packed, mask=wanted & (place < LISTED))
        else:
            _race, _token, first, second = pivots(races, tokens, splits, row, COLUMNS)
            weight = weight_of(scaled)
            here = sums + row * 3 * splits + split
            tl.store(here, tl.sum(weight, 0))
            tl.store(here + splits, tl.sum(tl.where(_is_before(key, ids, first, SHIFT), weight, 0), 0))
            tl.store(here + 2 * splits, tl.sum(tl.where(_is_before(key, ids, second, SHIFT), weight, 0), 0))


@triton.jit
def _is_before(key, ids, packed, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tokens are before one that is packed: of those of its key the ones with lower ids."""
    return key < (packed >> SHIFT).to(tl.int32) + (ids < (packed & ((1 << SHIFT) - 1))).to(tl.int32)
