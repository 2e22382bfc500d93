"""The attention kernels: one work item against its columns, and the reduction of rows that several items share.

It owns the computation on the device; `work.py` decides which rows are computed against which columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["adjacent"])
def attend_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    items, gathered, adjacent, bounds, index, q, kv, out, lse, part_out, part_lse,
    q_strides, head_strides, out_strides, first_heads, group, heads, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, SHARED: tl.constexpr, GROUPS: tl.constexpr, STRIDES: tl.constexpr,
    GATHERED: tl.constexpr, FLIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Program (item, KV head): one item of work by online softmax (Milakov & Gimelshein 2018; FlashAttention).

    `items`, `gathered`, `bounds` and `index` are buffers of a `WorkPlan`; an item's fields are those of `Item`, in
    order. The first `adjacent` programs take `items`; with `GATHERED` the others take `gathered`. `kv` is (keys,
    values, key scales, value scales). `scale` is that of scores times log2(e), because exp2 is used. `KEY` and `VALUE`
    are `Parts`. `STRIDES` of slots in keys, values and scales are constants, so that offsets within a tile are. `FLIP`
    is `Config.flip`, `SPLIT` is `Config.split`; `SHARED` and `GROUPS` are those of `Shape`.
    """
    program = tl.program_id(0)
    item = items + program * FIELDS
    if GATHERED:  # noqa: SIM102  # one test is of the compiler, the other of the device
        if program >= adjacent:
            item = gathered + (program - adjacent) * FIELDS
    count = tl.load(item + 2)
    if count == 0:
        return
    head = tl.program_id(1)
    flat = tl.load(item + 1) + tl.arange(0, BLOCK_M)
    valid = tl.arange(0, BLOCK_M) < count
    token = tl.load(item) + flat // group
    q_head = first_heads[0] + head * group + flat % group
    q_rows = token.to(tl.int64) * q_strides[0] + q_head * q_strides[1]
    queries, queries_rest = _queries(q, q_rows, valid, KEY, FLIP)
    low = tl.load(bounds + token * 2, mask=valid, other=0)
    high = tl.load(bounds + token * 2 + 1, mask=valid, other=0)
    place = tl.load(item + 3)
    columns = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)

    kv_head = (first_heads[1] + head).to(tl.int64)
    kv = (
        kv[0] + kv_head * head_strides[0], kv[1] + kv_head * head_strides[1],
        kv[2] + kv_head * head_strides[2], kv[3] + kv_head * head_strides[2],
    )  # fmt: skip
    top, total, mixed, mixed_rest = _nothing(VALUE, FLIP, BLOCK_M)
    in_place = columns
    if GATHERED:  # loops that follow each other share memory for their tiles; the branches of an `if` may not
        in_place = _if_wanted(program < adjacent, columns)
    top, total, mixed, mixed_rest = _columns(
        top, total, mixed, mixed_rest, queries, queries_rest, low, high, in_place, index, place, kv, scale,
        KEY, VALUE, SHARED, GROUPS, STRIDES, False, FLIP, SPLIT, BLOCK_N,
    )  # fmt: skip
    if GATHERED:
        by_index = _if_wanted(program >= adjacent, columns)
        top, total, mixed, mixed_rest = _columns(
            top, total, mixed, mixed_rest, queries, queries_rest, low, high, by_index, index, place, kv, scale,
            KEY, VALUE, SHARED, GROUPS, STRIDES, True, FLIP, SPLIT, BLOCK_N,
        )  # fmt: skip
    _finish(
        tl.load(item + 8), top, total, mixed, mixed_rest, token, q_head, valid, out, lse, part_out, part_lse,
        out_strides, head, heads, VALUE, FLIP, BLOCK_M,
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
    GATHERED: tl.constexpr, FLIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Update the online softmax, as in `_step`, by all columns of an item.

    `columns` are its `start`, `full_start`, `full_stop` and `stop`. Whole tiles need no mask; the tiles before and
    after them do.
    """
    start, full_start, full_stop, stop = columns
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


@triton.jit
def reduce_kernel(  # type: ignore[no-untyped-def]
    splits, out, lse, part_out, part_lse, out_strides, q_start, group, heads,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head, packed row): the merge of the row's partial results, `PARTS` at a time."""
    split = splits + tl.program_id(0) * FIELDS
    row = tl.program_id(2)
    if row >= tl.load(split + 2):
        return
    head = tl.program_id(1)
    flat = tl.load(split + 1) + row
    token = (tl.load(split) + flat // group).to(tl.int64)
    q_head = q_start + head * group + flat % group
    element = tl.arange(0, COLUMNS)
    inside = element < WIDTH
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros((COLUMNS,), tl.float32)
    first, last = tl.load(split + 3), tl.load(split + 4)
    for start in tl.range(first, last, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (part.to(tl.int64) * heads + head) * BLOCK_M + row
        seen = tl.load(part_lse + at, mask=part < last, other=float("-inf"))
        wanted = (seen > float("-inf"))[:, None] & inside[None, :]
        values = tl.load(part_out + at[:, None] * WIDTH + element[None, :], mask=wanted, other=0.0)
        new_top = tl.maximum(top, tl.max(seen, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(seen - base)
        shrunk = tl.exp(top - base)
        total = total * shrunk + tl.sum(weights, 0)
        mixed = mixed * shrunk + tl.sum(weights[:, None] * values, 0)
        top = new_top
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tl.store(out + token * out_strides[0] + q_head * out_strides[1] + element, mixed / total, mask=inside)
    tl.store(lse + token * out_strides[2] + q_head, tl.where(nothing, float("-inf"), top + tl.log(total)))
