"""The reduction of rows whose columns several work items share: the merge of their partial results.

It owns the order in which parts are added, which is the same whoever merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.early_launch import wait_for_inputs


@triton.jit
def merge_rows(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    token, first, start, size, part, last, out, lse, part_out, part_lse, out_strides, q_start, head, group, heads,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the result of the rows [start, start + ROWS) of `size` packed rows, of partial results [part, last).

    `token` and `first` are `row` and `first` of their item.
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)
    element = tl.arange(0, COLUMNS)[None, :]
    row = start + tl.arange(0, ROWS)
    valid = row < size
    mixed, logs = _merged(part_out, part_lse, part, last, row, valid, head, heads, WIDTH, COLUMNS, BLOCK_M, PARTS, ROWS)
    flat = first + row
    to = (token + flat // group).to(tl.int64)
    q_head = q_start + head * group + flat % group
    at = (to * out_strides[0] + q_head * out_strides[1])[:, None] + element
    tl.store(out + at, mixed, mask=valid[:, None] & (element < WIDTH))
    tl.store(lse + to * out_strides[2] + q_head, logs, mask=valid)


@triton.jit
def _merged(  # type: ignore[no-untyped-def]
    part_out, part_lse, first, last, rows, valid, head, heads, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(out [rows, COLUMNS], lse [rows]) of partial results [first, last), `PARTS` at a time."""
    element = tl.arange(0, COLUMNS)[None, None, :]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, PARTS, num_stages=1):
        part = start + tl.arange(0, PARTS)
        there = (part < last)[:, None] & valid[None, :]
        at = ((part.to(tl.int64) * heads + head) * BLOCK_M)[:, None] + rows[None, :]
        # other programs have stored them: nothing is read from the cache of this processor
        seen = tl.load(part_lse + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        wanted = there[:, :, None] & (element < WIDTH)
        values = tl.load(part_out + at[:, :, None] * WIDTH + element, mask=wanted, other=0.0, cache_modifier=".cg")
        values = tl.where((seen > float("-inf"))[:, :, None], values, 0.0)  # there may be NaN where nothing was seen
        new_top = tl.maximum(top, tl.max(seen, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(seen - base[None, :])
        shrunk = tl.exp(top - base)
        total = total * shrunk + tl.sum(weights, 0)
        mixed = mixed * shrunk[:, None] + tl.sum(weights[:, :, None] * values, 0)
        top = new_top
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    return mixed / total[:, None], tl.where(nothing, float("-inf"), top + tl.log(total))


@triton.jit
def reduce_kernel(  # type: ignore[no-untyped-def]
    splits, out, lse, part_out, part_lse, out_strides, q_start, group, heads,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head, packed row): the merge of the row's partial results, `PARTS` at a time."""
    split = splits + tl.program_id(0) * FIELDS
    row = tl.program_id(2)
    size = tl.load(split + 2)
    wait_for_inputs(EARLY)
    if row < size:
        merge_rows(
            tl.load(split), tl.load(split + 1), row, size, tl.load(split + 3), tl.load(split + 4), out, lse, part_out,
            part_lse, out_strides, q_start, tl.program_id(1), group, heads, WIDTH, BLOCK_M, PARTS, 1,
        )  # fmt: skip
