"""Pairs of row and choice sorted by expert, by counting in three kernels, and the tiles of the sorted pairs.

It owns these kernels; it must not know what is computed for a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128  # pairs of a program, each of which is compared with all others
_WARPS = 4


class SortedPairs(NamedTuple):
    """The P pairs of row and choice, of E experts. Those of an expert stay in order; those of others come nowhere."""

    # int32 [P]: the pair at each place; places from the last of `stops` on are not written
    pairs: Tensor
    # int64 [P]: the place of each pair; of one of another expert the last, which is then in no group
    places: Tensor
    # int32 [E]: where each expert's places end
    stops: Tensor
    # int32 [tiles, 3]: expert, first place and end of each tile; expert -1 where there are fewer tiles
    tiles: Tensor


def sort_pairs(experts: Tensor, first: int, count: int, rows: int) -> SortedPairs:
    """Sort pairs by `experts` [T, k] int64, of which those in [first, first + count) are of interest.

    A tile has up to `rows` places, all of one expert. Nothing is read back.
    """
    pairs, device = experts.numel(), experts.device
    blocks = triton.cdiv(pairs, _BLOCK)
    tiles = pairs // rows + min(count, pairs)  # as many as there can be
    counts = torch.empty(count, blocks, dtype=torch.int32, device=device)
    totals, stops = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
    found = SortedPairs(
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty(pairs, dtype=torch.int64, device=device),
        stops,
        torch.empty(tiles, 3, dtype=torch.int32, device=device),
    )
    bins = triton.next_power_of_2(count + 1)
    _count_kernel[(blocks,)](
        experts, counts, first, pairs, blocks, EXPERTS=count, BINS=bins, BLOCK=_BLOCK, num_warps=_WARPS
    )
    _before_kernel[(count,)](counts, totals, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=_WARPS)
    _place_kernel[(max(blocks, tiles),)](
        experts, counts, totals, *found, first, pairs, blocks, tiles,
        EXPERTS=count, BINS=bins, BLOCK=_BLOCK, ROWS=rows, num_warps=_WARPS,
    )  # fmt: skip
    return found


@triton.jit
def _expert_of(experts, pair, pairs, first, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]  # see below
    """The expert of each pair counted from `first`, `EXPERTS` for others."""
    expert = tl.load(experts + pair, mask=pair < pairs, other=first + EXPERTS) - first
    return tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=("first", "pairs", "blocks"))
def _count_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    experts, counts, first, pairs, blocks, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """counts [E, blocks]: how many pairs of each block chose each expert."""
    block = tl.program_id(0)
    expert = _expert_of(experts, block * BLOCK + tl.arange(0, BLOCK), pairs, first, EXPERTS)
    number = tl.arange(0, BINS)
    tl.store(counts + number * blocks + block, tl.histogram(expert, BINS), mask=number < EXPERTS)


@triton.jit(do_not_specialize=("blocks",))
def _before_kernel(counts, totals, blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (expert): its counts [blocks] become those of all blocks before, and their sum goes into `totals`."""
    block = tl.arange(0, BLOCKS)
    row = counts + tl.program_id(0) * blocks + block
    found = tl.load(row, mask=block < blocks, other=0)
    tl.store(row, tl.cumsum(found, 0) - found, mask=block < blocks)
    tl.store(totals + tl.program_id(0), tl.sum(found, 0))


@triton.jit(do_not_specialize=("first", "pairs", "blocks", "tiles"))
def _place_kernel(  # type: ignore[no-untyped-def]
    experts, before, totals, sorted_pairs, places, stops, tiles_of, first, pairs, blocks, tiles,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (block of pairs, or tile, of the same number): the places of its pairs, and its tile."""
    program = tl.program_id(0)
    number = tl.arange(0, BINS)
    total = tl.load(totals + number, mask=number < EXPERTS, other=0)
    stop = tl.cumsum(total, 0)
    if program == 0:
        tl.store(stops + number, stop, mask=number < EXPERTS)
    if program < blocks:
        lane = tl.arange(0, BLOCK)
        pair = program * BLOCK + lane
        expert = _expert_of(experts, pair, pairs, first, EXPERTS)
        held = expert < EXPERTS
        earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        place = tl.gather(stop - total, expert, 0) + tl.sum(earlier.to(tl.int32), 1)
        place += tl.load(before + expert * blocks + program, mask=held, other=0)
        tl.store(sorted_pairs + place, pair, mask=held)
        tl.store(places + pair, tl.where(held, place, pairs - 1).to(tl.int64), mask=pair < pairs)
    if program < tiles:
        each = (total + ROWS - 1) // ROWS
        mine = tl.sum(((tl.cumsum(each, 0) <= program) & (number < EXPERTS)).to(tl.int32), 0)
        start = tl.sum(tl.where(number < mine, total, 0), 0)
        start += (program - tl.sum(tl.where(number < mine, each, 0), 0)) * ROWS
        end = tl.minimum(start + ROWS, tl.sum(tl.where(number <= mine, total, 0), 0))
        tl.store(tiles_of + program * 3, tl.where(mine < EXPERTS, mine, -1))
        tl.store(tiles_of + program * 3 + 1, start)
        tl.store(tiles_of + program * 3 + 2, end)
