"""The weighted sum of a mixture's experts for many rows: PyTorch's grouped products of pairs sorted and gathered here.

It owns the order of the steps and the gathering; it must not know how rows are routed, nor who holds other experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.experts import RoutedExperts, activate
from longspan.models.sorted_pairs import SortedPairs, sort_pairs

_TILE = 128  # places of a tile, of which nothing is asked
_ROWS = 4  # places that one program gathers
_COLUMNS = 1024  # columns that it copies at a time
_WARPS = 4


def sum_sorted(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """See `ExpertSum`: `sum_grouped` with fewer and faster passes beside the products, for experts without biases."""
    if not x.shape[0]:
        return torch.zeros_like(x)
    experts = experts.contiguous()
    order = sort_pairs(experts, held.first, len(held), _TILE)
    gathered = gather_pairs(x.contiguous(), order, experts.shape[1])
    inner = activate(_product(gathered, held.gate_up.stored, order), held.limit, held.ops)
    found = _product(inner, held.down.stored, order)
    return held.ops.sum_of_places(found, order.places.view_as(experts), weights, order.stops)


def _product(x: Tensor, weight: Tensor, order: SortedPairs) -> Tensor:
    """x [P, in] · weight [E, out, in]ᵀ → [P, out]; places in no group are not written."""
    found: Tensor = torch._grouped_mm(x, weight.mT, offs=order.stops)
    return found


def gather_pairs(x: Tensor, order: SortedPairs, chosen: int) -> Tensor:
    """x [T, hidden] → the rows of the pairs in their order [P, hidden]; places in no group are not written."""
    pairs, hidden = len(order.pairs), x.shape[1]
    out = x.new_empty(pairs, hidden)
    _gather_kernel[(triton.cdiv(pairs, _ROWS),)](
        x, order.pairs, order.stops[-1:], out,
        CHOSEN=chosen, HIDDEN=hidden, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    x, order, stop, out, CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (block of places): out = x[order // CHOSEN]."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < tl.load(stop)
    row = (tl.load(order + place, mask=inside, other=0) // CHOSEN).to(tl.int64)
    for start in range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        wanted = inside[:, None] & (column < HIDDEN)[None, :]
        values = tl.load(x + row[:, None] * HIDDEN + column[None, :], mask=wanted)
        tl.store(out + place.to(tl.int64)[:, None] * HIDDEN + column[None, :], values, mask=wanted)
