"""The attention kernel: work items against their columns.

It owns the computation on the device; `work.py` decides which rows are computed against which columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.attention.backends.triton.items import fetch, item_of
from longspan.attention.backends.triton.reduce import merge_rows
from longspan.early_launch import wait_for_inputs

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["adjacent"])
def attend_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    items, gathered, adjacent, counts, arrived, bounds, index, q, kv, out, lse, part_out, part_lse,
    q_strides, head_strides, out_strides, first_heads, group, heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr, GROUPS: tl.constexpr, STRIDES: tl.constexpr,
    GATHERED: tl.constexpr, FLIP: tl.constexpr, SPLIT: tl.constexpr, MERGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FIELDS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for each item of work and KV head: online softmax (Milakov & Gimelshein 2018; FlashAttention).

    `items`, `gathered`, `counts`, `arrived`, `bounds` and `index` are buffers of a `WorkPlan`; an item's fields are
    those of `Item`, in order. `kv` is (keys, values, key scales, value scales). `scale` is that of scores times
    log2(e), because exp2 is used. `KEY` and `VALUE` are `Parts`. `STRIDES` of slots in keys, values and scales are
    constants, so that offsets within a tile are. `FLIP`, `SPLIT` and `MERGES` are of `Config`; `SHARED` and `GROUPS`
    are those of `Shape`.

    With `MERGES` the heads of an item follow each other, and gathered items the adjacent ones, so that programs without
    work come last. The last program that has computed a part of some rows merges their parts, `ROWS` rows and `PARTS`
    parts at a time, in the same order whoever computed them. Without it the first `adjacent` programs take `items`, and
    with `GATHERED` the others take `gathered`.
    """
    if MERGES:
        pair = tl.program_id(0)
        here = tl.load(counts)
        total = here
        if GATHERED:
            total += tl.load(counts + 1)
        number, head, there = pair // heads, pair % heads, here
    else:
        number, head, there, total = tl.program_id(0), tl.program_id(1), adjacent, tl.num_programs(0)
    item, by_index = item_of(items, gathered, number, there, FIELDS, GATHERED)
    wanted = number < total
    if MERGES and EARLY:  # noqa: SIM102  # one test is of the compiler, the other of the device
        if wanted:  # the first tiles, while the kernels before this one end
            kv_head = (first_heads[1] + head).to(tl.int64)
            fetch(
                item, by_index, index, kv[0] + kv_head * head_strides[0], kv[1] + kv_head * head_strides[1],
                KEY, VALUE, STRIDES, GATHERED, 2 * BLOCK_N,
            )  # fmt: skip
    size = tl.load(item + 2, mask=wanted, other=0)
    wait_for_inputs(EARLY)
    if size > 0:
        _attend(
            item, by_index, head, arrived, bounds, index, q, kv, out, lse, part_out, part_lse, q_strides, head_strides,
            out_strides, first_heads, group, heads, scale, KEY, VALUE, SHARED, GROUPS, STRIDES, GATHERED, FLIP, SPLIT,
            MERGES, BLOCK_M, BLOCK_N, PARTS, ROWS,
        )  # fmt: skip


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    item, by_index, head, arrived, bounds, index, q, kv, out, lse, part_out, part_lse, q_strides, head_strides,
    out_strides, first_heads, group, heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr, GROUPS: tl.constexpr, STRIDES: tl.constexpr,
    GATHERED: tl.constexpr, FLIP: tl.constexpr, SPLIT: tl.constexpr, MERGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One item for one KV head. `by_index` says whether its columns are gathered."""
    row, first, size, place = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    flat = first + tl.arange(0, BLOCK_M)
    columns = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
    partial, part, last = tl.load(item + 8), tl.load(item + 9), tl.load(item + 10)
    valid = tl.arange(0, BLOCK_M) < size
    token = row + flat // group
    q_head = first_heads[0] + head * group + flat % group
    q_rows = token.to(tl.int64) * q_strides[0] + q_head * q_strides[1]
    queries, queries_rest = _queries(q, q_rows, valid, KEY, FLIP)
    low = tl.load(bounds + token * 2, mask=valid, other=0)
    high = tl.load(bounds + token * 2 + 1, mask=valid, other=0)

    kv_head = (first_heads[1] + head).to(tl.int64)
    kv = (
        kv[0] + kv_head * head_strides[0], kv[1] + kv_head * head_strides[1],
        kv[2] + kv_head * head_strides[2], kv[3] + kv_head * head_strides[2],
    )  # fmt: skip
    top, total, mixed, mixed_rest = _nothing(VALUE, FLIP, BLOCK_M)
    in_place = columns
    if GATHERED:  # loops that follow each other share memory for their tiles; the branches of an `if` may not
        in_place = _if_wanted(by_index == 0, columns)
    top, total, mixed, mixed_rest = _columns(
        top, total, mixed, mixed_rest, queries, queries_rest, low, high, in_place, index, place, kv, scale,
        KEY, VALUE, SHARED, GROUPS, STRIDES, False, FLIP, SPLIT, MERGES, BLOCK_N,
    )  # fmt: skip
    if GATHERED:
        top, total, mixed, mixed_rest = _columns(
            top, total, mixed, mixed_rest, queries, queries_rest, low, high, _if_wanted(by_index, columns), index,
            place, kv, scale, KEY, VALUE, SHARED, GROUPS, STRIDES, True, FLIP, SPLIT, MERGES, BLOCK_N,
        )  # fmt: skip
    _finish(
        partial, top, total, mixed, mixed_rest, token, q_head, valid, out, lse, part_out, part_lse, out_strides, head,
        heads, VALUE, FLIP, BLOCK_M,
    )  # fmt: skip
    if MERGES:  # noqa: SIM102  # one test is of the compiler, the other of the device
        if partial >= 0:
            tl.debug_barrier()  # what one thread adds is seen after what all threads have stored
            others = tl.atomic_add(arrived + part * heads + head, 1, sem="acq_rel", scope="gpu")
            if others == last - part - 1:
                tl.store(arrived + part * heads + head, 0)  # for the next launch
                for start in tl.range(0, size, ROWS, num_stages=1):
                    merge_rows(
                        row, first, start, size, part, last, out, lse, part_out, part_lse, out_strides, first_heads[0],
                        head, group, heads, VALUE[0] + VALUE[2], BLOCK_M, PARTS, ROWS,
                    )  # fmt: skip


@triton.jit
def _nothing(VALUE: tl.constexpr, FLIP: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The state of an online softmax over no columns, as in `_step`."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = _zeros(VALUE[1], BLOCK_M, FLIP)
    mixed_rest = mixed
    if VALUE[2]:
        mixed_rest = _zeros(VALUE[3], BLOCK_M, FLIP)
    return top, total, mixed, mixed_rest


@triton.jit
def _if_wanted(wanted, columns):  # type: ignore[no-untyped-def]
    """The `columns` of an item as they are, or none."""
    start, full_start, full_stop, stop = columns
    return start, tl.where(wanted, full_start, start), tl.where(wanted, full_stop, start), tl.where(wanted, stop, start)


@triton.jit
def _queries(q, rows, valid, KEY: tl.constexpr, FLIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(main part, rest) of the queries, each [rows, width], or [width, rows] with `FLIP`."""
    main = _tile(q, rows, 1, valid, 0, KEY[0], KEY[1], True)
    rest = main
    if KEY[2]:
        rest = _tile(q, rows, 1, valid, KEY[0], KEY[2], KEY[3], True)
    if FLIP:
        main, rest = tl.trans(main), tl.trans(rest)
    return main, rest


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    top, total, mixed, mixed_rest, queries, queries_rest, low, high, columns, index, place, kv, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr, GROUPS: tl.constexpr, STRIDES: tl.constexpr,
    GATHERED: tl.constexpr, FLIP: tl.constexpr, SPLIT: tl.constexpr, ONE_LOOP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Update the online softmax, as in `_step`, by all columns of an item.

    `columns` are its `start`, `full_start`, `full_stop` and `stop`. Whole tiles need no mask; the tiles before and
    after them do, in a loop of their own. With few rows masks cost less than the end of one loop and the start of
    another, and `ONE_LOOP` masks all tiles.
    """
    start, full_start, full_stop, stop = columns
    if ONE_LOOP:
        full_start, full_stop = start, start
    else:
        for column in tl.range(full_start, full_stop, BLOCK_N):
            top, total, mixed, mixed_rest = _step(
                top, total, mixed, mixed_rest, queries, queries_rest, low, high, column, stop, index, place, kv,
                scale, KEY, VALUE, SHARED, GROUPS, STRIDES, GATHERED, FLIP, SPLIT, BLOCK_N, False,
            )  # fmt: skip
    before = tl.cdiv(full_start - start, BLOCK_N)
    after = tl.cdiv(stop - full_stop, BLOCK_N)
    for number in tl.range(0, before + after):
        column = tl.where(number < before, start + number * BLOCK_N, full_stop + (number - before) * BLOCK_N)
        top, total, mixed, mixed_rest = _step(
            top, total, mixed, mixed_rest, queries, queries_rest, low, high, column, stop, index, place, kv,
            scale, KEY, VALUE, SHARED, GROUPS, STRIDES, GATHERED, FLIP, SPLIT, BLOCK_N, True,
        )  # fmt: skip
    return top, total, mixed, mixed_rest


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    top, total, mixed, mixed_rest, queries, queries_rest, low, high, column, stop, index, place, kv, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr, GROUPS: tl.constexpr, STRIDES: tl.constexpr,
    GATHERED: tl.constexpr, FLIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the online softmax by one tile of columns. Without `MASKED` every row sees all columns of the tile.

    With it a row sees columns [low, high) below `stop`. `top` is the running maximum of scores, `total` the sum of
    weights, `mixed` and `mixed_rest` the weighted sums of the two parts of the values.
    """
    keys_axis: tl.constexpr = 0 if FLIP else 1
    columns = column + tl.arange(0, BLOCK_N)
    inside = columns < stop
    if GATHERED:
        first = 0
        rows = tl.load(index + place + columns, mask=inside, other=0).to(tl.int64)
    else:  # one 64-bit addition for the tile: offsets within it fit into 32 bits
        first = (place + column).to(tl.int64)
        rows = tl.arange(0, BLOCK_N)
    keys = _tile(kv[0] + first * STRIDES[0], rows, STRIDES[0], inside, 0, KEY[0], KEY[1], MASKED)
    keys_rest = keys
    if KEY[2]:
        keys_rest = _tile(kv[0] + first * STRIDES[0], rows, STRIDES[0], inside, KEY[0], KEY[2], KEY[3], MASKED)
    scores = _scores(queries, keys, column < stop, FLIP, SPLIT)
    if GROUPS > 0:
        scores *= _along(_scales(kv[2] + first * STRIDES[2], rows * STRIDES[2], inside, MASKED), keys_axis)
    if KEY[2]:
        more = _scores(queries_rest, keys_rest, stop > 0, FLIP, SPLIT)
        if GROUPS > 0:
            at = kv[2] + first * STRIDES[2] + (GROUPS - 1)
            more *= _along(_scales(at, rows * STRIDES[2], inside, MASKED), keys_axis)
        scores += more
    if MASKED:
        position = _along(columns, keys_axis)
        seen = (position >= _along(low, 1 - keys_axis)) & (position < _along(tl.minimum(high, stop), 1 - keys_axis))
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, keys_axis) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(scores * scale - _along(base, 1 - keys_axis))
    shrunk = tl.exp2(top - base)
    total = total * shrunk + tl.sum(weights, keys_axis)
    mixed *= _along(shrunk, 1 - keys_axis)
    values = keys
    if not SHARED:
        values = _tile(kv[1] + first * STRIDES[1], rows, STRIDES[1], inside, 0, VALUE[0], VALUE[1], MASKED)
    scaled = weights
    if GROUPS > 0:
        scaled *= _along(_scales(kv[3] + first * STRIDES[2], rows * STRIDES[2], inside, MASKED), keys_axis)
    mixed += _mix(scaled, values, queries.dtype, FLIP)
    if VALUE[2]:
        mixed_rest *= _along(shrunk, 1 - keys_axis)
        values_rest = keys_rest
        if not SHARED:
            at = kv[1] + first * STRIDES[1]
            values_rest = _tile(at, rows, STRIDES[1], inside, VALUE[0], VALUE[2], VALUE[3], MASKED)
        if GROUPS > 0:
            at = kv[3] + first * STRIDES[2] + (GROUPS - 1)
            weights *= _along(_scales(at, rows * STRIDES[2], inside, MASKED), keys_axis)
        mixed_rest += _mix(weights, values_rest, queries.dtype, FLIP)
    return new_top, total, mixed, mixed_rest


@triton.jit
def _zeros(width: tl.constexpr, rows: tl.constexpr, FLIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [rows, width], or [width, rows] with `FLIP`."""
    if FLIP:
        return tl.zeros((width, rows), tl.float32)
    else:  # noqa: RET505
        return tl.zeros((rows, width), tl.float32)


@triton.jit
def _scores(queries, keys, true, FLIP: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of queries and keys: [rows, columns], or [columns, rows] with `FLIP`.

    Where another product follows, Triton gives each warp all columns of its rows, so that of two warp groups with 64
    rows both compute everything. With `SPLIT` the product is in a branch on `true`, which always holds: what follows is
    not seen past a branch. `true` must differ between the parts of a row, or their branches become one.
    """
    left, right = _sides(queries, keys, FLIP)
    if SPLIT:
        if true:
            scores = tl.dot(left, right, input_precision="ieee")
        else:  # with a constant here, the compiler moves the conversion of the weights into the branch
            scores = tl.dot(left, right, input_precision="ieee") + 1.0
        return scores
    else:  # noqa: RET505
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _sides(queries, keys, FLIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right side of the product."""
    keys = keys.to(queries.dtype)
    if FLIP:
        return keys, queries
    else:  # noqa: RET505
        return queries, tl.trans(keys)


@triton.jit
def _mix(weights, values, dtype: tl.constexpr, FLIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weighted sums of values: [rows, width], or [width, rows] with `FLIP`."""
    if FLIP:
        return tl.dot(tl.trans(values.to(dtype)), weights.to(dtype), input_precision="ieee")
    else:  # noqa: RET505
        return tl.dot(weights.to(dtype), values.to(dtype), input_precision="ieee")


@triton.jit
def _along(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector as a matrix that varies along `axis`."""
    return x[:, None] if axis == 0 else x[None, :]


@triton.jit
def _scales(at, offsets, inside, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales of one group for the columns of a tile."""
    if MASKED:
        return tl.load(at + offsets, mask=inside, other=0.0)
    return tl.load(at + offsets)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    base, rows, stride, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr
):
    """Load elements [FIRST, FIRST + WIDTH) of `rows`: [rows, TILE], with zeros for what is masked or beyond WIDTH."""
    element = tl.arange(0, TILE)
    at = base + rows[:, None] * stride + (FIRST + element)[None, :]
    if MASKED:
        if WIDTH == TILE:
            return tl.load(at, mask=inside[:, None], other=0.0)
        return tl.load(at, mask=inside[:, None] & (element < WIDTH)[None, :], other=0.0)
    if WIDTH == TILE:
        return tl.load(at)
    return tl.load(at, mask=(element < WIDTH)[None, :], other=0.0)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    partial, top, total, mixed, mixed_rest, token, q_head, valid, out, lse, part_out, part_lse, strides, head, heads,
    VALUE: tl.constexpr, FLIP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Normalise, and store to the final or the partial result. Rows that saw no column get out 0 and lse -inf."""
    nothing = total == 0.0
    weight = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total))
    logs = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * _LN_2)
    if FLIP:
        mixed, mixed_rest = tl.trans(mixed), tl.trans(mixed_rest)
    mixed, mixed_rest = mixed * weight[:, None], mixed_rest * weight[:, None]
    if partial < 0:
        row = token.to(tl.int64)
        at = row * strides[0] + q_head * strides[1]
        _store(lse + row * strides[2] + q_head, logs, out, at, mixed, mixed_rest, valid, VALUE)
    else:
        row = (partial.to(tl.int64) * heads + head) * BLOCK_M + tl.arange(0, BLOCK_M)
        _store(part_lse + row, logs, part_out, row * (VALUE[0] + VALUE[2]), mixed, mixed_rest, valid, VALUE)


@triton.jit
def _store(lse, logs, out, rows, mixed, mixed_rest, valid, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store `logs` to pointers `lse`, and both parts of the result to `out` at offsets `rows`."""
    tl.store(lse, logs, mask=valid)
    element = tl.arange(0, VALUE[1])
    mask = valid[:, None] & (element < VALUE[0])[None, :]
    tl.store(out + rows[:, None] + element[None, :], mixed, mask=mask)
    if VALUE[2]:
        element = tl.arange(0, VALUE[3])
        mask = valid[:, None] & (element < VALUE[2])[None, :]
        tl.store(out + rows[:, None] + (VALUE[0] + element)[None, :], mixed_rest, mask=mask)
