"""Which item a program of the attention kernel computes, and what of its columns is brought nearer beforehand.

It computes nothing.
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
