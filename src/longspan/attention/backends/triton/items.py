"""How a program of the attention kernel comes by its items: which ones it takes, and where they are.

It owns the counter of pairs that are taken, and what of an item's columns is brought into the L2 cache before the
kernels before this one have ended; it computes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LANES = tl.constexpr(128)  # each brings adjacent columns, the first half of keys and the other of values


@triton.jit
def item_of(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    items, gathered, number, adjacent, FIELDS: tl.constexpr, GATHERED: tl.constexpr
):
    """(the item of this number, whether its columns are gathered); the first `adjacent` are those of `items`."""
    by_index = number >= adjacent
    item = items + number * FIELDS
    if GATHERED:
        item = tl.where(by_index, gathered + (number - adjacent) * FIELDS, item)
    return item, by_index


@triton.jit
def fetch(  # type: ignore[no-untyped-def]
    item, by_index, index, keys, values, KEY: tl.constexpr, VALUE: tl.constexpr, STRIDES: tl.constexpr,
    GATHERED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bring the first columns of an item into the L2 cache, up to `COLUMNS`: those of one KV head.

    What is stored there later is seen all the same. Only rows that follow each other without a gap, of a multiple of 16
    bytes, are brought.
    """
    SIZE: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    KEY_BYTES: tl.constexpr = (KEY[0] + KEY[2]) * SIZE
    VALUE_BYTES: tl.constexpr = (VALUE[0] + VALUE[2]) * SIZE
    EACH: tl.constexpr = COLUMNS * 2 // _LANES
    WITHOUT_GAPS: tl.constexpr = (STRIDES[0] * SIZE == KEY_BYTES) & (STRIDES[1] * SIZE == VALUE_BYTES)
    if WITHOUT_GAPS and (KEY_BYTES | VALUE_BYTES) % 16 == 0:
        lane = tl.arange(0, _LANES)
        of_keys = lane < _LANES // 2
        base = tl.where(of_keys, keys.to(tl.int64), values.to(tl.int64))
        size = tl.where(of_keys, KEY_BYTES, VALUE_BYTES)
        place, stop = tl.load(item + 3), tl.load(item + 7)
        column = tl.load(item + 4) + lane % (_LANES // 2) * EACH
        if GATHERED and by_index:
            for number in tl.static_range(EACH):
                there = column + number < stop
                slot = tl.load(index + place + column + number, mask=there, other=0)
                _fetch_bytes(base + slot.to(tl.int64) * size, tl.where(there, size, 0))
        else:
            _fetch_bytes(base + (place + column).to(tl.int64) * size, tl.minimum(stop - column, EACH) * size)


@triton.jit
def _fetch_bytes(at, count):  # type: ignore[no-untyped-def]
    """Bring `count` bytes at each address into the L2 cache, none if it is not positive."""
    tl.inline_asm_elementwise(
        "{ .reg .pred %p; setp.gt.s32 %p, $2, 0; @%p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [at, count], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def ask_for_pair(counts, wanted):  # type: ignore[no-untyped-def]
    """Take the next number from the counter in `counts` if `wanted` is 1, and none if it is 0.

    `number_of_pair` gives the number, and waits for it; work between the two hides the wait. (After the addition of a
    scalar all threads would wait at once.)
    """
    lane = tl.arange(0, _LANES)
    return tl.atomic_add(counts + 2 + lane * 0, 1, mask=lane < wanted, sem="relaxed")


@triton.jit
def number_of_pair(taken, counts, total, wanted):  # type: ignore[no-untyped-def]
    """The number that `ask_for_pair` took, or `total` if none was `wanted`.

    A number is taken for each of `total` pairs. Who took the last one sets the counter to 0, for the next launch.
    """
    number = tl.min(tl.where(tl.arange(0, _LANES) < wanted, taken, total), 0)
    if number == total - 1:
        tl.store(counts + 2, 0)
    return number
