"""The merge of attention states in one kernel, which reads each state once.

It owns this kernel and its launch; it must not know where states come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from longspan.attention.backends.triton.config import FUSED
from longspan.attention.rows import unit_stride
from longspan.attention.state import AttentionState

_MAX_PARTS = 16  # states of one launch, each of which takes two pointer arguments
_ELEMENTS = 1024  # elements of the result that one program computes: 8 for each thread, to have enough loads in flight
_WARPS = 4


def merge_parts(parts: Sequence[AttentionState], dtype: torch.dtype = torch.float32) -> AttentionState:
    """`attention.state.merge` in fp32, of any number of states out [T, Hq, Dv], lse [T, Hq]; `dtype` is that of out.

    States are read in place if their rows have one stride over T · Hq; otherwise they are copied first.
    """
    while len(parts) > _MAX_PARTS:
        groups = [parts[at : at + _MAX_PARTS] for at in range(0, len(parts), _MAX_PARTS)]
        parts = [merge_parts(group) for group in groups]
    if len(parts) == 1:
        return parts[0]
    tokens, heads, width = parts[0].out.shape
    out = torch.empty((tokens, heads, width), dtype=dtype, device=parts[0].out.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=out.device)
    if not out.numel():
        return AttentionState(out, lse)
    outs = tuple(unit_stride(part.out.reshape(-1, width)) for part in parts)
    lses = tuple(part.lse.reshape(-1) for part in parts)
    strides = tuple((o.stride(0), s.stride(0)) for o, s in zip(outs, lses, strict=True))
    columns = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // columns)
    grid = (triton.cdiv(tokens * heads, rows),)
    _merge_kernel[grid](
        outs, lses, strides, out, lse, tokens * heads, WIDTH=width, COLUMNS=columns, ROWS=rows, num_warps=_WARPS,
        enable_fp_fusion=FUSED,
    )  # fmt: skip
    return AttentionState(out, lse)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    outs, lses, strides, out_ptr, lse_ptr, total, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """One program merges `ROWS` rows (token and head); `strides` are those of rows, of each state's out and lse."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < total
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in tl.static_range(len(outs)):
        seen = tl.load(lses[part] + row * strides[part][1], mask=valid, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, seen)
    base = tl.where(top == float("-inf"), 0.0, top)  # weights of 0, not NaN, where no state saw a key
    total_weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in tl.static_range(len(outs)):
        seen = tl.load(lses[part] + row * strides[part][1], mask=valid, other=float("-inf")).to(tl.float32)
        weight = tl.exp(seen - base)
        wanted = (weight > 0)[:, None] & (column < WIDTH)[None, :]  # a state of weight 0 may hold NaN: it is not read
        values = tl.load(outs[part] + row[:, None] * strides[part][0] + column[None, :], mask=wanted, other=0.0)
        mixed += weight[:, None] * values.to(tl.float32)
        total_weight += weight
    nothing = total_weight == 0.0
    total_weight = tl.where(nothing, 1.0, total_weight)
    mixed /= total_weight[:, None]
    inside = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], mixed, mask=inside)
    tl.store(lse_ptr + row, tl.where(nothing, float("-inf"), base + tl.log(total_weight)), mask=valid)
