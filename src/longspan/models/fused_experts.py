"""The weighted sum of a mixture's experts for few rows, in four kernels that read each chosen expert once.

It owns these kernels and their launches; it must not know how rows are routed, nor who holds other experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.expert_forms import activated, finished, form_of, inner_size, pointers, rounded, step
from longspan.models.experts import RoutedExperts
from longspan.models.scaled import LARGEST, LEAST

MAX_PAIRS = 1024  # pairs of row and choice that one program can sort into tiles
TILE = 16  # pairs of one expert in a tile: the fewest rows of a matrix instruction
_COLUMNS = 64  # columns of a product that one program computes: many programs, as one row has few tiles
_INNER = 128  # elements of the inner dimension in flight together
_STAGES = 4
_WARPS = 4
_LEAST = 128  # pairs that the sorting program is compiled for: one for each of its threads
_SUMMED = 1024  # columns of the sum that one program computes


def few_enough(held: RoutedExperts, pairs: int) -> bool:
    """Whether these kernels take so many pairs of row and choice, and few experts have more than one tile."""
    return 0 < pairs <= min(MAX_PAIRS, TILE * held.total)


def sum_fused(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """See `ExpertSum`. Nothing is read back; `few_enough` must hold.

    A tile is up to 16 pairs of one expert. Results of pairs stay in the order of the pairs. Activations and sums are in
    fp32, and are rounded to the dtype of x between the products and at the end.
    """
    gate_up, down = held.gate_up.stored, held.down.stored
    pairs, count, form = experts.numel(), len(held), form_of(down)
    hidden, width = x.shape[1], gate_up.shape[1] // 2
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    tiles = pairs // TILE + min(count, pairs)  # as many as there can be
    expert_of = torch.empty(tiles, dtype=torch.int32, device=x.device)
    pairs_of = torch.empty(tiles, TILE, dtype=torch.int32, device=x.device)
    inner = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    outer = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    _tiles_kernel[(tiles,)](
        experts, expert_of, pairs_of, held.first, pairs,
        EXPERTS=count, BINS=triton.next_power_of_2(count + 1), PAIRS=triton.next_power_of_2(max(pairs, _LEAST)),
        TILE=TILE, num_warps=_WARPS,
    )  # fmt: skip
    constants = {
        "HIDDEN": hidden, "WIDTH": width, "FORM": form, "TILE": TILE, "COLUMNS": _COLUMNS,
        "INNER": inner_size(form, _INNER), "LARGEST": LARGEST, "LEAST": LEAST,
        "num_warps": _WARPS, "num_stages": _STAGES,
    }  # fmt: skip
    _gate_up_kernel[(tiles, triton.cdiv(width, _COLUMNS))](
        x, pointers(gate_up, form), held.gate_up.scales, held.gate_up_bias, inner, expert_of, pairs_of, pairs,
        held.limit or 0.0, CHOSEN=experts.shape[1], CLAMPED=held.limit is not None, **constants,
    )  # fmt: skip
    _down_kernel[(tiles, triton.cdiv(hidden, _COLUMNS))](
        inner, pointers(down, form), held.down.scales, held.down_bias, weights, outer, expert_of, pairs_of, pairs,
        **constants,
    )  # fmt: skip
    return sum_pairs(outer, experts, held, x)


def sum_pairs(outer: Tensor, experts: Tensor, held: RoutedExperts, x: Tensor) -> Tensor:
    """Weighted results of pairs [P, hidden], of which those of experts that are not held may be anything → [T, hidden].

    `experts` [T, k] int64; the sums are rounded to the dtype of x [T, hidden].
    """
    out, hidden = torch.empty_like(x), x.shape[1]
    _sum_kernel[(x.shape[0], triton.cdiv(hidden, _SUMMED))](
        outer, experts, out, held.first, held.first + len(held),
        CHOSEN=experts.shape[1], HIDDEN=hidden, COLUMNS=_SUMMED, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    experts_ptr, expert_of, pairs_of, first, pairs,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program t finds the expert of tile t, counted from `first`, or -1 if there are fewer tiles; and its pairs.

    Tiles are in the order of experts. Places without a pair get the number of all pairs.
    """
    tile = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=first + EXPERTS).to(tl.int32) - first
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS)
    number = tl.arange(0, BINS)
    counts = tl.where(number < EXPERTS, tl.histogram(expert, BINS), 0)
    tiles = (counts + TILE - 1) // TILE
    stops = tl.cumsum(tiles, 0)
    mine = tl.sum((stops <= tile).to(tl.int32), 0)  # experts whose tiles come before; all of them past the last tile
    skipped = (tile - tl.sum(tl.where(number < mine, tiles, 0), 0)) * TILE  # pairs of this expert in earlier tiles
    left = tl.sum(tl.where(number == mine, counts, 0), 0) - skipped
    place = tl.arange(0, TILE)
    tl.store(expert_of + tile, tl.where(mine < EXPERTS, mine, -1))
    tl.store(pairs_of + tile * TILE + place, tl.full((TILE,), 0, tl.int32) + pairs, mask=place >= left)
    chosen = expert == mine  # never past the last tile: then `mine` is BINS, above every expert
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1 - skipped
    tl.store(pairs_of + tile * TILE + rank, pair, mask=chosen & (rank >= 0) & (rank < TILE))


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, weight, scales, bias, inner, expert_of, pairs_of, pairs, limit,
    CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CLAMPED: tl.constexpr, FORM: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """inner [P, width] = activation(x [T, hidden] · weight [E, 2 · width, hidden]ᵀ), for the pairs of one tile.

    Gate stands before up, or, with the clamped activation, they are interleaved.
    """
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs_of + tl.program_id(0) * TILE + tl.arange(0, TILE))
        real = (pair < pairs)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        near = tl.minimum(column, WIDTH - 1)  # read in place of columns that do not exist
        first = expert * (2 * WIDTH) + tl.program_id(1) * COLUMNS
        gate_row = expert * (2 * WIDTH) + (near * 2 if CLAMPED else near)
        up_row = gate_row + (1 if CLAMPED else WIDTH)
        rows = x + (pair // CHOSEN).to(tl.int64)[:, None] * HIDDEN
        gate = tl.zeros((TILE, COLUMNS), tl.float32)
        up = tl.zeros((TILE, COLUMNS), tl.float32)
        for start in range(0, HIDDEN, INNER):
            at = start + tl.arange(0, INNER)
            left = tl.load(rows + at[None, :], mask=real & (at < HIDDEN)[None, :], other=0.0)
            scale = 1.0
            if FORM == "fp8":
                left, scale = rounded(left, LARGEST, LEAST)
            gate = step(gate, left, scale, weight, scales, gate_row, first, start, HIDDEN, INNER, FORM, False)
            up = step(up, left, scale, weight, scales, up_row, first + WIDTH, start, HIDDEN, INNER, FORM, False)
        gate, up = finished(gate, FORM), finished(up, FORM)
        if bias is not None:
            gate += tl.load(bias + gate_row).to(tl.float32)[None, :]
            up += tl.load(bias + up_row).to(tl.float32)[None, :]
        found = activated(gate, up, limit, CLAMPED).to(inner.dtype.element_ty)
        inside = real & (column < WIDTH)[None, :]
        tl.store(inner + pair.to(tl.int64)[:, None] * WIDTH + column[None, :], found, mask=inside)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner, weight, scales, bias, shares, outer, expert_of, pairs_of, pairs,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """outer [P, hidden] = share · (inner [P, width] · weight [E, hidden, width]ᵀ + bias), for the pairs of one tile."""
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs_of + tl.program_id(0) * TILE + tl.arange(0, TILE))
        real = (pair < pairs)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = expert * HIDDEN + tl.program_id(1) * COLUMNS
        row = expert * HIDDEN + tl.minimum(column, HIDDEN - 1)
        rows = inner + pair.to(tl.int64)[:, None] * WIDTH
        found = tl.zeros((TILE, COLUMNS), tl.float32)
        for start in range(0, WIDTH, INNER):
            at = start + tl.arange(0, INNER)
            left = tl.load(rows + at[None, :], mask=real & (at < WIDTH)[None, :], other=0.0)
            scale = 1.0
            if FORM == "fp8":
                left, scale = rounded(left, LARGEST, LEAST)
            found = step(found, left, scale, weight, scales, row, first, start, WIDTH, INNER, FORM, False)
        found = finished(found, FORM)
        if bias is not None:
            found += tl.load(bias + row).to(tl.float32)[None, :]
        found *= tl.load(shares + pair, mask=pair < pairs, other=0.0)[:, None]
        inside = real & (column < HIDDEN)[None, :]
        tl.store(outer + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :], found, mask=inside)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    outer, experts, out, first, stop, CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """out [T, hidden] = the sum of each row's pairs; those of experts not in [first, stop) were not written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOSEN):  # unrolled, so that all loads are in flight together
        pair = row * CHOSEN + choice
        expert = tl.load(experts + pair)
        written = tl.where(expert >= first, tl.where(expert < stop, HIDDEN, 0), 0)
        total += tl.load(outer + pair * HIDDEN + column, mask=column < written, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + column, total.to(out.dtype.element_ty), mask=column < HIDDEN)
