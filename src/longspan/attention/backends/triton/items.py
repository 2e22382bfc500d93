"""What a program of the attention kernel does before it may read what the kernels before it store: it finds its item.

It owns the order of items, and what is brought into the cache meanwhile; it computes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    item, by_index, index, kv_head, kv, head_strides, KEY: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr,
    STRIDES: tl.constexpr, GATHERED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Bring the first `COUNT` columns of an item into the L2 cache. What is stored there later is seen all the same."""
    start, stop = tl.load(item + 4), tl.load(item + 7)
    if start < stop:
        place = tl.load(item + 3) + tl.minimum(start + tl.arange(0, COUNT), stop - 1)
        slot = place
        if GATHERED:  # noqa: SIM102  # one test is of the compiler, the other of the device
            if by_index:
                slot = tl.load(index + place)
        slot = slot.to(tl.int64)
        _fetch_rows(kv[0] + kv_head * head_strides[0] + slot * STRIDES[0], KEY[0] + KEY[2])
        if not SHARED:
            _fetch_rows(kv[1] + kv_head * head_strides[1] + slot * STRIDES[1], VALUE[0] + VALUE[2])


@triton.jit
def _fetch_rows(at, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring rows of `WIDTH` elements at pointers `at` into the L2 cache, if the instruction can: by 16 bytes."""
    SIZE: tl.constexpr = WIDTH * (at.dtype.element_ty.primitive_bitwidth // 8)
    if SIZE % 16 == 0:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [at.to(tl.int64), SIZE],
            tl.int32, False, 1,
        )  # fmt: skip
