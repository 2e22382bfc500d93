"""Draw tokens in Triton: at most four launches for a batch, none of which sorts or writes a row of the vocabulary.

It owns the launches and the kernels that read every row. Their reference is `gumbel.sample_together`; on every device
they give the tokens of the sampler's code for one row, up to rounding of sums.

A row is cut into blocks, one program each, so that one row fills the device. Rows are read up to three times, from the
second time on from the L2 cache:

1. the largest logit of each block;
2. Gumbel noise, in fp32 and with a bound of its error: the best token of each block;
3. `edges.py`: where top-p alone may end. Two tokens are tried: the best of the row, and the best of those before it in
   the order of top-p. How much probability is before each is summed. Of a row with top-k, the tokens that may be among
   the first k are listed instead;
4. `winner.py`: the best token that is kept.

Probabilities are summed as integers, so a sum does not depend on the order in which programs run. Without filters only
1, 2 and 4 are launched, and for greedy rows 1 and a smaller 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.attention.rows import unit_stride
from longspan.early_launch import early_options, wait_for_inputs
from longspan.engine.rank.sampling.edges import edges_kernel, peak_of, store_bound
from longspan.engine.rank.sampling.gumbel import DrawParameters
from longspan.engine.rank.sampling.scores import (
    CLOSE,
    divided,
    packed_of,
    parameter,
    race_of,
    seed_of,
    shifted_logits,
)
from longspan.engine.rank.sampling.winner import best_of_blocks, store_peak, winner_kernel

BLOCK = tl.constexpr(2048)  # tokens of a program
LISTED = 8192  # tokens that fit the list of a row with top-k; of a row with more the whole vocabulary is read instead
_GROUPS = 1024  # at most, unless a row has more blocks: the k-th of their largest logits is a bound for the row's k-th
_WARPS, _ROW_WARPS = 4, 8
_NOT_SPECIALISED = ["rows"]


def draw(
    logits: Tensor, parameters: DrawParameters | None, positions: Tensor | None, listed_tokens: int = LISTED
) -> Tensor:
    """Draw one token for each of R rows of `logits` [R, vocab], fp32 or narrower, at `positions` int64 [R].

    Returns `gumbel.outcome`. Without parameters all rows are greedy: they get the lowest of their most likely tokens.
    """
    logits = unit_stride(logits)
    rows, vocabulary = logits.shape
    device, early = logits.device, early_options(logits.device)
    result = torch.empty((2, rows), dtype=torch.int64, device=device)
    if not rows:
        return result
    splits = triton.cdiv(vocabulary, BLOCK.value)
    columns = triton.next_power_of_2(splits)
    peaks = torch.empty((rows, splits), dtype=torch.float32, device=device)
    best = torch.empty((rows, splits), dtype=torch.int32, device=device)
    size, grid = (logits, logits.stride(0), vocabulary), (rows, splits)
    if parameters is None or positions is None:
        _peaks_kernel[grid](
            *size, None, rows, peaks, best, None, None, FILTERS=False, PARTS=1, num_warps=_WARPS, **early
        )
        _greedy_kernel[(rows,)](peaks, best, splits, result, rows, COLUMNS=columns, num_warps=_WARPS, **early)
        return result
    filters, parts = parameters.filters, 1
    groups = bounds = counts = listed = sums = None
    if filters:
        parts = min(32, max(1, _GROUPS // columns))
        groups = torch.empty((rows, splits * parts), dtype=torch.float32, device=device)
        bounds = torch.empty(rows, dtype=torch.float32, device=device)
        counts = torch.empty(rows, dtype=torch.int64, device=device)
        listed = torch.empty((rows, listed_tokens), dtype=torch.int64, device=device)
        sums = torch.empty((rows, 3, splits), dtype=torch.int64, device=device)
    races = torch.empty((rows, splits), dtype=torch.float32, device=device)
    tokens = torch.empty((rows, splits), dtype=torch.int64, device=device)
    tables, sizes = (parameters.table, positions, rows), {"FILTERS": filters, "COLUMNS": columns}
    packing = {"SHIFT": max(1, (vocabulary - 1).bit_length()), "LISTED": listed_tokens if filters else 1}
    groups_of = {"PARTS": parts, "num_warps": _WARPS, **early}
    _peaks_kernel[grid](*size, parameters.table, rows, peaks, best, groups, counts, FILTERS=filters, **groups_of)
    _noise_kernel[grid](
        *size, *tables, peaks, groups, bounds, races, tokens, SHIFT=packing["SHIFT"], **sizes, **groups_of
    )
    if filters:
        edges_kernel[grid](
            *size, *tables, peaks, bounds, races, tokens, counts, listed, sums,
            COLUMNS=columns, BLOCK=BLOCK.value, **packing, num_warps=_WARPS, **early,
        )  # fmt: skip
    winner_kernel[(rows,)](
        *size, *tables, peaks, best, races, tokens, splits, counts, listed, sums, result,
        BLOCK=BLOCK.value, **sizes, **packing, num_warps=_ROW_WARPS, **early,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _peaks_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, rows, peaks, best, groups, counts,
    FILTERS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The largest logit of a block, NaN if it holds one, and its lowest id; for top-k those of PARTS groups too."""
    wait_for_inputs(EARLY)
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    if FILTERS:  # noqa: SIM102  # one test is of the compiler, the other of the device
        if tl.load(table + rows + row) < vocabulary:
            largest = tl.max(tl.reshape(values, (PARTS, BLOCK // PARTS)), 1)
            tl.store(groups + (row * splits + split) * PARTS + tl.arange(0, PARTS), largest)
            if split == 0:
                tl.store(counts + row, 0)
    peak, at = tl.max(values, 0, return_indices=True)
    unordered = tl.max((values != values).to(tl.int32), 0) > 0
    tl.store(peaks + row * splits + split, tl.where(unordered, float("nan"), peak))
    tl.store(best + row * splits + split, tl.minimum(split * BLOCK + at, vocabulary - 1))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _noise_kernel(  # type: ignore[no-untyped-def]
    logits, stride, vocabulary, table, positions, rows, peaks, groups, bounds, races, tokens,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The smallest race of a block among the tokens that min-p keeps, and that token, packed.

    -1 stands for a token if others are so close that their scores decide. The first program of a row with top-k also
    stores a bound of its k-th logit.
    """
    wait_for_inputs(EARLY)
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = parameter(table, 2, rows, row).to(tl.float32)
    if temperature > 0:
        ids = split * BLOCK + tl.arange(0, BLOCK)
        peak = peak_of(peaks, splits, row, COLUMNS)
        shifted = shifted_logits(logits, stride, row, ids, ids < vocabulary, peak)
        race = race_of(shifted, ids, seed_of(table, positions, row), temperature)
        if FILTERS:
            floor = parameter(table, 4, rows, row).to(tl.float32)
            if floor > float("-inf"):
                race = tl.where(divided(shifted, temperature) >= floor, race, float("inf"))
            top_k = tl.load(table + rows + row)
            if (split == 0) & (top_k < vocabulary):
                store_bound(groups + row * splits * PARTS, splits * PARTS, top_k, bounds + row, COLUMNS * PARTS)
        # as integers, which a warp reduces by one instruction: races are not negative
        least = tl.min(race.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
        close = race <= least * CLOSE
        token = tl.minimum(tl.min(tl.where(close, ids, vocabulary), 0), vocabulary - 1)
        scaled = divided(tl.load(logits + row * stride + token).to(tl.float32) - peak, temperature)
        alone = tl.sum(close.to(tl.int32), 0) == 1
        tl.store(races + row * splits + split, least)
        tl.store(tokens + row * splits + split, tl.where(alone, packed_of(scaled, token, SHIFT), -1))


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def _greedy_kernel(peaks, best, splits, result, rows, COLUMNS: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The most likely token of a row."""
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    peak, found, token = best_of_blocks(peaks, best, splits, row, COLUMNS)
    tl.store(result + row, token.to(tl.int64))
    store_peak(result, rows, row, found, peak)
