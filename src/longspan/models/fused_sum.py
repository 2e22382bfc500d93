"""The weighted sum of each row's pairs, read where a product sorted by expert has left them.

It owns this kernel and its launch; it must not know how rows are routed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # columns of the sum that one program computes: 16 bytes for each thread
_WARPS = 4


def sum_of_places_fused(found: Tensor, places: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
    """See `sum_of_places`. Sums are in fp32 and rounded once."""
    rows, hidden = places.shape[0], found.shape[1]
    out = torch.empty(rows, hidden, dtype=found.dtype, device=found.device)
    _weighted_kernel[(rows, triton.cdiv(hidden, _COLUMNS))](
        found, places.contiguous(), weights.contiguous(), stops[-1:], out,
        CHOSEN=places.shape[1], HIDDEN=hidden, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _weighted_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
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
