"""The weighted sum of a mixture's experts for many rows: products of tiles of the pairs sorted by expert.

It owns these kernels and their launches; it must not know how rows are routed, nor who holds other experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.models.expert_forms import activated, finished, form_of, inner_size, pointers, rounded, step
from longspan.models.experts import RoutedExperts
from longspan.models.fused_experts import sum_pairs
from longspan.models.fused_rounding import round_rows
from longspan.models.scaled import BLOCK, LARGEST, LEAST
from longspan.models.sorted_pairs import SortedPairs, sort_pairs


@dataclass(frozen=True)
class Tile:
    """What one program of a product computes."""

    # columns of the result; of gate and of up each
    columns: int
    # elements of the inner dimension in one step
    inner: int
    # steps in flight
    stages: int
    # of the program
    warps: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of both products of a form."""

    # pairs of a tile
    rows: int
    # of the product with gate and up
    gate_up: Tile
    # of the product with down
    down: Tile
    # whether the result is computed transposed, so that decoded weights stay in registers
    flip: bool = False


_LARGE = 160 << 10  # bytes of shared memory that the larger tiles need
TILES = {  # of each form for few rows of an expert, and for many
    "plain": (
        Tiles(64, Tile(64, 64, 3, 4), Tile(128, 64, 3, 4)),
        Tiles(128, Tile(128, 64, 3, 8), Tile(256, 64, 3, 8)),
    ),
    "fp8": (
        Tiles(64, Tile(128, 128, 2, 8), Tile(128, 128, 3, 8)),
        Tiles(128, Tile(128, 128, 3, 8), Tile(128, 128, 3, 8)),
    ),
    "fp8_bytes": (
        Tiles(64, Tile(64, 128, 2, 8), Tile(128, 128, 2, 8)),
        Tiles(64, Tile(64, 128, 2, 8), Tile(128, 128, 2, 8)),
    ),
    "mxfp4": (
        Tiles(32, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4), flip=True),
        Tiles(128, Tile(128, 64, 3, 8), Tile(128, 64, 3, 8), flip=True),
    ),
}


def sum_tiled(held: RoutedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """See `ExpertSum`. Nothing is read back, and all shapes follow from those of the arguments.

    Activations are computed in fp32 and rounded to the dtype of x, or to FP8, between the products; the results of
    pairs are rounded to the dtype of x, and summed in fp32.
    """
    if not x.shape[0]:
        return torch.zeros_like(x)
    form, x, experts, weights = form_of(held.down.stored), x.contiguous(), experts.contiguous(), weights.contiguous()
    tiles = _tiles_of(form, experts.numel() / held.total, x.device)
    order = sort_pairs(experts, held.first, len(held), tiles.rows)
    inner, scales = gate_up_of_tiles(held, x, order, experts.shape[1], form, tiles)
    outer = down_of_tiles(held, inner, scales, order, weights, x, form, tiles)
    return sum_pairs(outer, experts, held, x)


def _tiles_of(form: str, rows: float, device: torch.device) -> Tiles:
    """The tiles for so many rows of an expert on average."""
    few, many = TILES[form]
    return few if rows <= few.rows or shared_limit(device) < _LARGE else many


def shared_limit(device: torch.device) -> int:
    """Bytes of a processor's shared memory that one program can have."""
    if device.type != "cuda":
        return _LARGE
    properties: Any = torch.cuda.get_device_properties(device)  # its type stubs lack some
    return int(properties.shared_memory_per_block_optin)


def gate_up_of_tiles(
    held: RoutedExperts, x: Tensor, order: SortedPairs, chosen: int, form: str, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """x [T, hidden] → activations of the pairs in their order [P, width], in FP8 with scales [width / 128, P]."""
    weight, tile = held.gate_up.stored, tiles.gate_up
    (rows, hidden), width, scales = x.shape, weight.shape[1] // 2, None
    inner, inner_scales = x.new_empty(len(order.pairs), width), None
    if form == "fp8":
        x, scales = round_rows(x, rows)
        scales = scales.t()
        inner = torch.empty(inner.shape, dtype=x.dtype, device=x.device)
        inner_scales = scales.new_empty(width // BLOCK, len(inner))
    _gate_up_tiles[(triton.cdiv(width, tile.columns), len(order.tiles))](
        x, scales, pointers(weight, form), held.gate_up.scales, held.gate_up_bias, inner, inner_scales,
        order.pairs, order.tiles, len(inner), rows, held.limit or 0.0,
        CHOSEN=chosen, HIDDEN=hidden, WIDTH=width, CLAMPED=held.limit is not None, FORM=form, FLIP=tiles.flip,
        ROWS=tiles.rows, COLUMNS=tile.columns, INNER=inner_size(form, tile.inner), LARGEST=LARGEST, LEAST=LEAST,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return inner, inner_scales


def down_of_tiles(
    held: RoutedExperts, inner: Tensor, scales: Tensor | None, order: SortedPairs, weights: Tensor, x: Tensor,
    form: str, tiles: Tiles,
) -> Tensor:  # fmt: skip
    """What `gate_up_of_tiles` returned → weighted results of the pairs [P, hidden], not sorted, in the dtype of x."""
    weight, tile = held.down.stored, tiles.down
    (pairs, width), hidden = inner.shape, x.shape[1]
    outer = x.new_empty(pairs, hidden)
    _down_tiles[(triton.cdiv(hidden, tile.columns), len(order.tiles))](
        inner, scales, pointers(weight, form), held.down.scales, held.down_bias, weights, outer,
        order.pairs, order.tiles, pairs,
        HIDDEN=hidden, WIDTH=width, FORM=form, FLIP=tiles.flip,
        ROWS=tiles.rows, COLUMNS=tile.columns, INNER=inner_size(form, tile.inner),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return outer


@triton.jit(do_not_specialize=("pairs", "tokens"))
def _gate_up_tiles(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    x, x_scales, weight, scales, bias, inner, inner_scales, order, tiles, pairs, tokens, limit,
    CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CLAMPED: tl.constexpr, FORM: tl.constexpr,
    FLIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, tile): inner = activation(x · weightᵀ), for the places of the tile.

    Programs of the same rows are adjacent. Rows and columns that do not exist are computed from others.
    """
    tile = tiles + tl.program_id(1) * 3
    expert = tl.load(tile).to(tl.int64)
    if expert >= 0:
        start, stop = tl.load(tile + 1), tl.load(tile + 2)
        place = start + tl.arange(0, ROWS)
        row = tl.load(order + tl.minimum(place, stop - 1)) // CHOSEN
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        near = tl.minimum(column, WIDTH - 1)
        first = expert * (2 * WIDTH) + tl.program_id(0) * COLUMNS
        gate_row = expert * (2 * WIDTH) + (near * 2 if CLAMPED else near)
        up_row = gate_row + (1 if CLAMPED else WIDTH)
        rows = x + row.to(tl.int64)[:, None] * HIDDEN
        gate = tl.zeros((COLUMNS, ROWS) if FLIP else (ROWS, COLUMNS), tl.float32)
        up = tl.zeros((COLUMNS, ROWS) if FLIP else (ROWS, COLUMNS), tl.float32)
        for at in range(0, HIDDEN, INNER):
            left = _loaded(rows, at, HIDDEN, INNER)
            scale = 1.0
            if FORM == "fp8":
                scale = tl.load(x_scales + at // INNER * tokens + row)
            gate = step(gate, left, scale, weight, scales, gate_row, first, at, HIDDEN, INNER, FORM, FLIP)
            up = step(up, left, scale, weight, scales, up_row, first + WIDTH, at, HIDDEN, INNER, FORM, FLIP)
        gate, up = finished(gate, FORM), finished(up, FORM)
        if FLIP:
            gate, up = tl.trans(gate), tl.trans(up)
        if bias is not None:
            gate += tl.load(bias + gate_row).to(tl.float32)[None, :]
            up += tl.load(bias + up_row).to(tl.float32)[None, :]
        found = activated(gate, up, limit, CLAMPED)
        if FORM == "fp8":  # the columns are one group of 128
            found, scale = rounded(found, LARGEST, LEAST)
            tl.store(inner_scales + tl.program_id(0) * pairs + place, scale, mask=place < stop)
        inside = (place < stop)[:, None] & (column < WIDTH)[None, :]
        to = inner + place.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(to, found.to(inner.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("pairs",))
def _down_tiles(  # type: ignore[no-untyped-def]
    inner, inner_scales, weight, scales, bias, shares, outer, order, tiles, pairs,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, tile): outer = share · (inner · weightᵀ + bias), at the pairs of the tile."""
    tile = tiles + tl.program_id(1) * 3
    expert = tl.load(tile).to(tl.int64)
    if expert >= 0:
        start, stop = tl.load(tile + 1), tl.load(tile + 2)
        place = tl.minimum(start + tl.arange(0, ROWS), stop - 1)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        first = expert * HIDDEN + tl.program_id(0) * COLUMNS
        row = expert * HIDDEN + tl.minimum(column, HIDDEN - 1)
        rows = inner + place.to(tl.int64)[:, None] * WIDTH
        found = tl.zeros((COLUMNS, ROWS) if FLIP else (ROWS, COLUMNS), tl.float32)
        for at in range(0, WIDTH, INNER):
            left = _loaded(rows, at, WIDTH, INNER)
            scale = 1.0
            if FORM == "fp8":
                scale = tl.load(inner_scales + at // INNER * pairs + place)
            found = step(found, left, scale, weight, scales, row, first, at, WIDTH, INNER, FORM, FLIP)
        found = finished(found, FORM)
        if FLIP:
            found = tl.trans(found)
        if bias is not None:
            found += tl.load(bias + row).to(tl.float32)[None, :]
        pair = tl.load(order + place)
        found *= tl.load(shares + pair)[:, None]
        inside = (start + tl.arange(0, ROWS) < stop)[:, None] & (column < HIDDEN)[None, :]
        to = outer + pair.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        tl.store(to, found.to(outer.dtype.element_ty), mask=inside)


@triton.jit
def _loaded(rows, start, K: tl.constexpr, INNER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns [start, start + INNER) of rows that begin at the pointers `rows` [T, 1], zeros from K on."""
    at = start + tl.arange(0, INNER)
    if K % INNER == 0:
        return tl.load(rows + at[None, :])
    return tl.load(rows + at[None, :], mask=(at < K)[None, :], other=0.0)
