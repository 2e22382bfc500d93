"""Products of few rows on a GPU: a weight is read once, and its first bytes are on their way before x is known.

It owns the kernel and what it is launched for; PyTorch's product is the reference, and takes all other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from longspan.early_launch import early_options, launches_early, wait_for_inputs
from longspan.models.ops.kernels import silu

MOST_ROWS = 2  # rows of x; from there on PyTorch's product is as fast: see docs/LOG.md
_PIECE = 2048  # columns of a weight that are loaded together, at most
_HELD = 64  # elements of a weight that a thread holds: few, so that many programs on a processor read at a time
_MOST_COLUMNS = 32768  # of a weight: a program holds whole rows
_TOGETHER = 8  # adjacent elements of a thread: 16 bytes


class FewRowsLinear:
    """x [T, in] → x · weight [out, in]ᵀ + bias [out] in 16 bits on a GPU; up to `MOST_ROWS` rows by the kernel.

    Sums are in fp32 and rounded once.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features = weight.shape[0]
        self._weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out]."""
        if not _few(x):
            return F.linear(x, self._weight, bias)
        out = x.new_empty(len(x), self.out_features)
        _launch(x, self._weight, bias, out, gated=False)
        return out

    def swiglu(self, x: Tensor) -> Tensor | None:
        """`LayerOps.swiglu` of the product with x [T, in] → [T, out / 2], in one launch; None for other rows."""
        if not _few(x):
            return None
        out = x.new_empty(len(x), self.out_features // 2)
        _launch(x, self._weight, None, out, gated=True)
        return out


def problem_of_kernel(weight: Tensor) -> str | None:
    """Why the kernel is of no use for a weight [out, in]; None if it is."""
    if not launches_early(weight.device):
        return f"kernels are not launched early on {weight.device}, and without that PyTorch's product is as fast"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel is for 16 bits, not {weight.dtype}".replace("torch.", "")
    if weight.shape[1] > _MOST_COLUMNS or weight.shape[1] % _TOGETHER or not weight.is_contiguous():
        return f"a row has {weight.shape[1]} elements, not a multiple of {_TOGETHER} up to {_MOST_COLUMNS}"
    return None


def _few(x: Tensor) -> bool:
    return 0 < len(x) <= MOST_ROWS


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gated: bool) -> None:
    """out [R, out] = x [R, in] · weight [out, in]ᵀ + bias [out], or if `gated` its SwiGLU. Rows of x may be strided."""
    x = x if x.stride(1) == 1 else x.contiguous()
    outputs, inputs = out.shape[1], weight.shape[1]
    piece = min(_PIECE, triton.next_power_of_2(inputs))
    pieces = triton.cdiv(inputs, piece)
    warps = 4 if inputs <= _PIECE else 8
    held = warps * 32 * _HELD // (pieces * piece * (2 if gated else 1))
    together = max(1, 1 << max(held, 1).bit_length() - 1)
    product_kernel[(triton.cdiv(outputs, together),)](
        x, weight, bias, out, x.stride(0), outputs,
        INPUTS=inputs, ROWS=len(x), OUTPUTS=together, PIECE=piece, PIECES=pieces, TOGETHER=_TOGETHER, GATED=gated,
        EXACT=x.is_cuda, num_warps=warps, **early_options(x.device),
    )  # fmt: skip


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    x, weight, bias, out, stride, outputs,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    TOGETHER: tl.constexpr, GATED: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (block of `OUTPUTS` outputs): their sums over all inputs, for all rows.

    With `GATED` an output is silu(gate) · up, rounded as `swiglu_kernel` does; the rows of up stand behind all those of
    gate. A weight never changes, so a program loads its part into registers before it waits for what computes x.
    """
    number = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    wanted = number < outputs
    row_of = number.to(tl.int64)
    held = _held(weight + row_of[:, None] * INPUTS, wanted, INPUTS, PIECE, PIECES)
    if GATED:
        held_up = _held(weight + (row_of + outputs)[:, None] * INPUTS, wanted, INPUTS, PIECE, PIECES)
    wait_for_inputs(EARLY)
    kind = out.dtype.element_ty
    for row in tl.static_range(ROWS):
        total = _sums(held, x + row * stride, INPUTS, OUTPUTS, PIECE, PIECES, TOGETHER)
        if bias is not None:
            total += tl.load(bias + number, mask=wanted, other=0.0).to(tl.float32)
        if GATED:
            gate = total.to(kind).to(tl.float32)
            up = _sums(held_up, x + row * stride, INPUTS, OUTPUTS, PIECE, PIECES, TOGETHER).to(kind).to(tl.float32)
            total = silu(gate, kind, EXACT) * up
        tl.store(out + row * outputs + number, total.to(kind), mask=wanted)


@triton.jit
def _held(at, wanted, INPUTS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pieces of rows of a weight that begin at pointers `at` [OUTPUTS, 1], each [OUTPUTS, PIECE]."""
    column = tl.arange(0, PIECE)[None, :]
    pieces = ()
    for piece in tl.static_range(PIECES):
        inside = wanted[:, None]
        if (piece + 1) * PIECE > INPUTS:
            inside = inside & (column < INPUTS - piece * PIECE)
        pieces = pieces + (tl.load(at + piece * PIECE + column, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    held, x, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """The sums [OUTPUTS] of the held rows times the row of x, in fp32.

    A thread adds its own adjacent products first, so that threads exchange sums once.
    """
    column = tl.arange(0, PIECE)
    sums = tl.zeros((OUTPUTS, PIECE // TOGETHER), tl.float32)
    for piece in tl.static_range(PIECES):
        values = tl.load(x + piece * PIECE + column, mask=column < INPUTS - piece * PIECE, other=0.0).to(tl.float32)
        products = held[piece].to(tl.float32) * values[None, :]
        sums += tl.sum(tl.reshape(products, (OUTPUTS, PIECE // TOGETHER, TOGETHER)), 2)
    return tl.sum(sums, 1)
