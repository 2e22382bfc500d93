"""The weighted sum of a mixture's experts for few rows, in four kernels that read each chosen expert once.

It owns these kernels and their launches; it must not know how rows are routed, nor who holds other experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.experts import RoutedExperts

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
    gate_up, down = held.gate_up.weight, held.down.weight
    if gate_up is None or down is None:
        raise TypeError("these experts are stored one by one")
    pairs, count = experts.numel(), len(held)
    _, hidden, width = down.shape
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    tiles = pairs // TILE + min(count, pairs)  # as many as there can be
    expert_of = torch.empty(tiles, dtype=torch.int32, device=x.device)
    pairs_of = torch.empty(tiles, TILE, dtype=torch.int32, device=x.device)
    inner = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    outer = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    _tiles_kernel[(tiles,)](
        experts, expert_of, pairs_of, held.first, pairs,
        EXPERTS=count, BINS=triton.next_power_of_2(count + 1), PAIRS=triton.next_power_of_2(max(pairs, _LEAST)),
        TILE=TILE, num_warps=_WARPS,
    )  # fmt: skip
    constants = {"TILE": TILE, "COLUMNS": _COLUMNS, "INNER": _INNER, "num_warps": _WARPS, "num_stages": _STAGES}
    _gate_up_kernel[(tiles, triton.cdiv(width, _COLUMNS))](
        x, gate_up, held.gate_up_bias, inner, expert_of, pairs_of, pairs, held.limit or 0.0,
        CHOSEN=experts.shape[1], HIDDEN=hidden, WIDTH=width, CLAMPED=held.limit is not None, **constants,
    )  # fmt: skip
    _down_kernel[(tiles, triton.cdiv(hidden, _COLUMNS))](
        inner, down, held.down_bias, weights, outer, expert_of, pairs_of, pairs,
        HIDDEN=hidden, WIDTH=width, **constants,
    )  # fmt: skip
    _sum_kernel[(x.shape[0], triton.cdiv(hidden, _SUMMED))](
        outer, experts, out, held.first, held.first + count,
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
    x, weight, bias, inner, expert_of, pairs_of, pairs, limit,
    CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CLAMPED: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """inner [P, width] = activation(x [T, hidden] · weight [E, 2 · width, hidden]ᵀ), for the pairs of one tile.

    Gate stands before up, or, with the clamped activation, they are interleaved.
    """
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs_of + tl.program_id(0) * TILE + tl.arange(0, TILE))
        real = (pair < pairs)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        gate_row = expert * (2 * WIDTH) + (column * 2 if CLAMPED else column)
        up_row = gate_row + (1 if CLAMPED else WIDTH)
        rows = x + (pair // CHOSEN).to(tl.int64)[:, None] * HIDDEN
        gate = tl.zeros((TILE, COLUMNS), tl.float32)
        up = tl.zeros((TILE, COLUMNS), tl.float32)
        inside = (column < WIDTH)[None, :]
        for start in range(0, HIDDEN, INNER):
            at = start + tl.arange(0, INNER)
            left = tl.load(rows + at[None, :], mask=real & (at < HIDDEN)[None, :], other=0.0)
            wanted = (at < HIDDEN)[:, None] & inside
            right = tl.load(weight + gate_row[None, :] * HIDDEN + at[:, None], mask=wanted, other=0.0)
            gate = tl.dot(left, right, gate, input_precision="ieee")
            right = tl.load(weight + up_row[None, :] * HIDDEN + at[:, None], mask=wanted, other=0.0)
            up = tl.dot(left, right, up, input_precision="ieee")
        if bias is not None:
            gate += tl.load(bias + gate_row, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + up_row, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        if CLAMPED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
            gate = gate / (1.0 + tl.exp(-1.702 * gate))
        else:
            gate = gate / (1.0 + tl.exp(-gate))
        found = (gate * up).to(inner.dtype.element_ty)
        tl.store(inner + pair.to(tl.int64)[:, None] * WIDTH + column[None, :], found, mask=real & inside)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner, weight, bias, shares, outer, expert_of, pairs_of, pairs,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """outer [P, hidden] = share · (inner [P, width] · weight [E, hidden, width]ᵀ + bias), for the pairs of one tile."""
    expert = tl.load(expert_of + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        pair = tl.load(pairs_of + tl.program_id(0) * TILE + tl.arange(0, TILE))
        real = (pair < pairs)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < HIDDEN)[None, :]
        row = expert * HIDDEN + column
        rows = inner + pair.to(tl.int64)[:, None] * WIDTH
        found = tl.zeros((TILE, COLUMNS), tl.float32)
        for start in range(0, WIDTH, INNER):
            at = start + tl.arange(0, INNER)
            left = tl.load(rows + at[None, :], mask=real & (at < WIDTH)[None, :], other=0.0)
            wanted = (at < WIDTH)[:, None] & inside
            right = tl.load(weight + row[None, :] * WIDTH + at[:, None], mask=wanted, other=0.0)
            found = tl.dot(left, right, found, input_precision="ieee")
        if bias is not None:
            found += tl.load(bias + row, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
        found *= tl.load(shares + pair, mask=pair < pairs, other=0.0)[:, None]
        tl.store(outer + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :], found, mask=real & inside)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    outer, experts, out, first, stop, CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """out [T, hidden] = the sum of each row's pairs; those of experts not in [first, stop) were not written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in range(CHOSEN):
        pair = row * CHOSEN + choice
        expert = tl.load(experts + pair)
        written = tl.where(expert >= first, tl.where(expert < stop, HIDDEN, 0), 0)
        total += tl.load(outer + pair * HIDDEN + column, mask=column < written, other=0.0)
    tl.store(out + row * HIDDEN + column, total.to(out.dtype.element_ty), mask=column < HIDDEN)
