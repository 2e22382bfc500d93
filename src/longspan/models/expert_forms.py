"""The step of a product along its inner dimension, with weights in the form in which they are stored.

It owns the forms and their decoding in registers, for the kernels of a mixture's experts. A form is one of

- `plain`: weight [rows, K] in the dtype of the activations;
- `fp8`: values [rows, K] float8_e4m3fn and fp32 scales [rows / 128, K / 128]. Activations are rounded to FP8 with a
  scale for each 128 columns of a row, as `scaled.rounded` does, and multiplied in FP8 (compute capability 8.9);
- `fp8_bytes`: the same weights as bytes, decoded for a processor without FP8; activations are not rounded;
- `mxfp4`: values uint8 [rows, K / 2], the first of two in the low half, and uint8 scales [rows, K / 32], exponents of
  powers of two with a bias of 127 (OCP Microscaling 1.0). Activations are not rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.scaled import BLOCK

_FP8_CAPABILITY = (8, 9)


def form_of(weight: Tensor) -> str:
    """The form of stacked weights, by their dtype and what their device multiplies."""
    if weight.dtype == torch.uint8:
        return "mxfp4"
    if weight.dtype != torch.float8_e4m3fn:
        return "plain"
    multiplies = weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) >= _FP8_CAPABILITY
    return "fp8" if multiplies else "fp8_bytes"


def pointers(weight: Tensor, form: str) -> Tensor:
    """What a kernel is given for the weight: bytes where it cannot have FP8."""
    return weight.view(torch.uint8) if form == "fp8_bytes" else weight


def inner_size(form: str, plain: int) -> int:
    """Elements of the inner dimension in one step: `plain`, or a block of scales."""
    return BLOCK if form.startswith("fp8") else plain


@triton.jit
def rounded(left, LARGEST: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]  # see below
    """left [T, 128] → FP8 values [T, 128] and fp32 scales [T]. A value between two FP8 numbers may go the other way
    than with a division."""
    found = left.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(found), axis=1) / LARGEST, LEAST)
    return (found * (1.0 / scale)[:, None]).to(tl.float8e4nv), scale


@triton.jit
def step(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    found, left, left_scale, weight, scales, rows, first, start,
    K: tl.constexpr, INNER: tl.constexpr, FORM: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """found [T, C] + left [T, INNER] · weight[rows, start : start + INNER]ᵀ, for int64 rows [C] from `first` on.

    With `FLIP` `found` is [C, T]: decoded weights are then the operand that may stay in registers. `left` has zeros
    from column K on. With FP8 it has `left_scale` [T], and all rows have the scales of the first one.
    """
    at = start + tl.arange(0, INNER)
    if FORM == "mxfp4":
        half, block = start // 2 + tl.arange(0, INNER // 2), start // 32 + tl.arange(0, INNER // 32)
        values = weight + rows[:, None] * (K // 2) + half[None, :]
        powers = scales + rows[:, None] * (K // 32) + block[None, :]
        if K % INNER == 0:
            packed, power = tl.load(values), tl.load(powers)
        else:
            packed = tl.load(values, mask=(half < K // 2)[None, :], other=0)
            power = tl.load(powers, mask=(block < K // 32)[None, :], other=0)
        right = _decoded(packed, power, left.dtype)
        if FLIP:
            found = tl.dot(right, tl.trans(left), found, input_precision="ieee")
        else:
            found = tl.dot(left, tl.trans(right), found, input_precision="ieee")
    elif FORM == "plain":
        values = weight + rows[None, :] * K + at[:, None]
        right = tl.load(values) if K % INNER == 0 else tl.load(values, mask=(at < K)[:, None], other=0.0)
        found = tl.dot(left, right, found, input_precision="ieee")
    else:
        right = tl.load(weight + rows[None, :] * K + at[:, None])
        scale = tl.load(scales + (first // 128) * (K // 128) + start // 128)
        if FORM == "fp8":
            found += tl.dot(left, right) * (left_scale * scale)[:, None]
        else:
            bits = right.to(tl.int8, bitcast=True).to(tl.int32)  # with copies of the sign in front
            right = ((bits << 20) & -0x78100000).to(tl.float32, bitcast=True) * 2.0**120
            found += tl.dot(left, right.to(left.dtype), input_precision="ieee") * scale
    return found


@triton.jit
def _decoded(packed, power, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """MXFP4 uint8 [C, n / 2] with uint8 scales [C, n / 32] → [C, n], 2^-63 times the numbers.

    The bits of a value, put where fp32 has them, are those of 2^-126 times the value, also where it is 0 or 1/2. The
    other half of this exponent is left to `finished`, since with all of it a scale could be too large. Numbers are
    exact from 2^-84 on.
    """
    columns: tl.constexpr = packed.shape[0]
    halves: tl.constexpr = packed.shape[1]
    factor = ((power.to(tl.int32) + 63) << 23).to(tl.float32, bitcast=True)
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (columns, halves // 16, 16)), (columns, halves))
    bits = packed.to(tl.int8, bitcast=True).to(tl.int32)  # with copies of the sign in front
    low = (((bits << 28) >> 6) & -0x7E400000).to(tl.float32, bitcast=True) * factor
    high = ((bits << 18) & -0x7E400000).to(tl.float32, bitcast=True) * factor
    return tl.reshape(tl.join(low.to(kind), high.to(kind)), (columns, 2 * halves))


@triton.jit
def finished(found, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The product, of the sum of all steps."""
    return found * 2.0**63 if FORM == "mxfp4" else found


@triton.jit
def activated(gate, up, limit, CLAMPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """SwiGLU of fp32 gate and up, or gpt-oss's clamped activation."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        return gate / (1.0 + tl.exp(-1.702 * gate)) * up
    return gate / (1.0 + tl.exp(-gate)) * up
