"""The Triton kernels of the operations between matrix products.

It owns the kernels. They round where `plain.py` rounds, so in 16 bits both give the same numbers, but for the order in
which a norm sums its squares, and for `sum_kernel`, which rounds once. With `EXACT` functions are CUDA's own, as in
PyTorch; Triton's interpreter lacks them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from longspan.early_launch import wait_for_inputs
from longspan.norm_arithmetic import normalised


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    x, residual, weight, total, out, strides, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row): the norm of x, or with `ADD` that of total = residual + x.

    `strides` are those of rows, of x, residual and out.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    kind = out.dtype.element_ty
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    values = tl.load(x + row * strides[0] + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * strides[1] + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * WIDTH + column, values.to(kind), mask=inside)
        values = values.to(kind).to(tl.float32)
    normed = normalised(values, factor, eps, kind, WIDTH)
    tl.debug_barrier()  # out may be x, and a thread may store where another one has to load first
    tl.store(out + row * strides[2] + column, normed, mask=inside)


@triton.jit(do_not_specialize=("rows",))
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up, out, rows, stride, width, EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Program (block of rows, block of columns): silu(gate) · up."""
    wait_for_inputs(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < width)
    kind = out.dtype.element_ty
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (silu(gate, kind, EXACT) * up).to(kind), mask=inside)


@triton.jit
def clamped_swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up, out, stride, width, limit, slope, EXACT: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (row, block of columns): gate · sigmoid(slope · gate) · (up + 1), of clamped gate and up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind = out.dtype.element_ty
    gate = tl.load(gate_up + row * stride + 2 * column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + 2 * column + 1, mask=inside, other=0.0).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)  # comparisons keep NaN, as PyTorch's clamp does
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    sloped = (gate * slope).to(kind).to(tl.float32)
    sigmoid = tl.div_rn(1.0, 1.0 + exp(-sloped, EXACT)).to(kind).to(tl.float32)
    swish = (gate * sigmoid).to(kind).to(tl.float32)
    tl.store(out + row * width + column, (swish * (up + 1.0).to(kind).to(tl.float32)).to(kind), mask=inside)


@triton.jit
def silu(x, kind: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """x · sigmoid(x) of fp32 x, rounded to `kind`, in fp32."""
    return tl.div_rn(x, 1.0 + exp(-x, EXACT)).to(kind).to(tl.float32)


@triton.jit
def exp(x, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXACT:
        return libdevice.exp(x)
    return tl.exp(x)


@triton.jit
def rope_table_kernel(  # type: ignore[no-untyped-def]
    positions, inverse, cos, sin, factor, HALF: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr
):
    """Program (row): cos and sin of the row's angles, for rows of 2 · `HALF` elements.

    Triton's own cos is for small angles only, and an angle may be as large as a position.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    kind = cos.dtype.element_ty
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inverse + column, mask=inside, other=0.0)
    if EXACT:
        x, y = libdevice.cos(angle), libdevice.sin(angle)
    else:
        x, y = tl.cos(angle), tl.sin(angle)
    x, y = (x * factor).to(kind), (y * factor).to(kind)
    to = row * 2 * HALF + column
    tl.store(cos + to, x, mask=inside)
    tl.store(cos + to + HALF, x, mask=inside)
    tl.store(sin + to, -y, mask=inside)
    tl.store(sin + to + HALF, y, mask=inside)


@triton.jit
def rope_kernel(  # type: ignore[no-untyped-def]
    q, k, q_weight, k_weight, cos, sin, q_strides, k_strides, q_heads, k_heads, eps,
    WIDTH: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row, block of `HEADS` heads, those of q before those of k): rotate heads in place.

    `WIDTH` are the elements of a head, `DIM` those that are rotated; `HALF` and `REST` are powers of two with room for
    half of these, and for the others.
    """
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1)
    cos += row * DIM
    sin += row * DIM
    if block < blocks:
        _rotate_heads(
            q + row * q_strides[0], q_strides[1], block * HEADS, q_heads, q_weight, cos, sin, eps,
            WIDTH, DIM, INTERLEAVED, NORM, HEADS, HALF, REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            k + row * k_strides[0], k_strides[1], (block - blocks) * HEADS, k_heads, k_weight, cos, sin, eps,
            WIDTH, DIM, INTERLEAVED, NORM, HEADS, HALF, REST,
        )  # fmt: skip


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x, stride, first, heads, weight, cos, sin, eps,
    WIDTH: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate heads [first, first + HEADS) of one row, of `heads` in all; with `NORM` they are normalised before."""
    kind = x.dtype.element_ty
    head = first + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    rest = DIM + tl.arange(0, REST)
    rotated = pair < DIM // 2
    inside = (head < heads)[:, None] & rotated[None, :]
    inside_rest = (head < heads)[:, None] & (rest < WIDTH)[None, :]
    x += head[:, None] * stride
    if INTERLEAVED:
        left, right = 2 * pair, 2 * pair + 1
    else:
        left, right = pair, DIM // 2 + pair
    a = tl.load(x + left[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + right[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + pair, mask=rotated, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + DIM // 2 + pair, mask=rotated, other=0.0).to(tl.float32)[None, :]
    if NORM:
        others = tl.load(x + rest[None, :], mask=inside_rest, other=0.0).to(tl.float32)
        squares = tl.sum(a * a + b * b, axis=1) + tl.sum(others * others, axis=1)
        scale = tl.rsqrt(tl.div_rn(squares, WIDTH * 1.0) + eps)[:, None]
        a = _scaled(a * scale, weight + left, rotated, kind)
        b = _scaled(b * scale, weight + right, rotated, kind)
        others = _scaled(others * scale, weight + rest, rest < WIDTH, kind)
    tl.debug_barrier()  # a thread may store where another one has to load first
    tl.store(x + pair[None, :], ((a * c).to(kind).to(tl.float32) - b * s).to(kind), mask=inside)
    tl.store(x + (DIM // 2 + pair)[None, :], ((b * c).to(kind).to(tl.float32) + a * s).to(kind), mask=inside)
    if NORM:
        tl.store(x + rest[None, :], others.to(kind), mask=inside_rest)


@triton.jit
def _scaled(normed, weight, inside, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """normed [HEADS, n] · weight [n] in fp32, both rounded to `kind`."""
    scale = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    return (normed.to(kind).to(tl.float32) * scale[None, :]).to(kind).to(tl.float32)


@triton.jit
def embed_kernel(  # type: ignore[no-untyped-def]
    token_ids, table, out, first, rows, width, BLOCK: tl.constexpr
):
    """Program (row, block of columns): the row of `table` for a token of [first, first + rows), or zeros."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(token_ids + row) - first
    readable = tl.where((entry >= 0) & (entry < rows), width, 0)
    values = tl.load(table + entry * width + column, mask=column < readable, other=0.0)
    tl.store(out + row * width + column, values, mask=column < width)


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    found, places, weights, stop, out, CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (row, block of columns). Rows from `stop` on were not written, and are not read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    written = tl.load(stop)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOSEN):  # unrolled, so that all loads are in flight together
        place = tl.load(places + row * CHOSEN + choice)
        weight = tl.load(weights + row * CHOSEN + choice).to(tl.float32)
        inside = column < tl.where(place < written, HIDDEN, 0)
        total += weight * tl.load(found + place * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + column, total.to(out.dtype.element_ty), mask=column < HIDDEN)
