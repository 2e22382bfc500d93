"""The rounding of activations to FP8 by one Triton kernel, in place of nine of PyTorch's.

It owns the kernel; what is rounded how is said by `scaled.rounded`, its reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.scaled import BLOCK, LARGEST, LEAST

_ROWS = 16  # of a program


def round_rows(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x [T, in] as FP8 values [rows, in] and fp32 scales [rows, in / 128], of which a column's are adjacent.

    Rows from T on are 0.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    groups = x.shape[1] // BLOCK
    values = torch.empty(rows, x.shape[1], dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    round_kernel[(triton.cdiv(rows, _ROWS), groups)](
        x, values, scales, x.stride(0), len(x), rows, x.shape[1],
        LARGEST=LARGEST, LEAST=LEAST, WIDTH=BLOCK, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return values, scales.t()


@triton.jit(do_not_specialize=("tokens", "rows"))  # or it is compiled anew for numbers of rows that 16 divides
def round_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    x, values, scales, stride, tokens, rows, columns,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, group of columns): see `round_rows`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < tokens)[:, None]
    found = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(found), axis=1), LARGEST), LEAST)
    tl.store(scales + tl.program_id(1).to(tl.int64) * rows + row, scale, mask=row < rows)
    rounded = tl.div_rn(found, scale[:, None]).to(values.dtype.element_ty)
    tl.store(values + row[:, None] * columns + column[None, :], rounded, mask=(row < rows)[:, None])
