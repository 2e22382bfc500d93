"""Attention of many query rows to latents on Hopper: groups of warps alternate, so that matrix units stay busy.

A latent is a key of 512 + 64 elements, and its first 512 are the value. Results of 64 rows take half of all registers,
so no program computes two blocks of rows in turn, and no other program runs beside it. Therefore two groups of four
warps share a block of rows: each holds half of the elements of the results, and they compute the scores of alternate
tiles. While one group computes weights from scores, the products of the other are computed (as FlashMLA's "seesaw",
but each tile's weights are applied in order). A third group loads tiles.

In Gluon, because Triton has no way to say which warps do what. It reads the work of `plan.py` as `attend.py` does, and
its results are those of `attend_kernel`. A tile is 64 columns; the tiles of an item are numbered, those that need no
mask first, and are computed in pairs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.attention.backends.triton.latent_tiles import (
    COLUMNS,
    HALF,
    ROWS,
    LatentBlock,
    LatentResults,
    LatentSource,
    allocate,
    column_of,
    columns_of,
    index_of,
    load_all,
)
from longspan.early_launch import wait_for_inputs

_SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
_MIXED = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_MIXED.value, k_width=2))
_SCORES_ROW = gl.constexpr(gl.SliceLayout(1, _SCORES.value))
_MIXED_ROW = gl.constexpr(gl.SliceLayout(1, _MIXED.value))
_LN_2 = gl.constexpr(0.6931471805599453)
_NEVER = gl.constexpr(float("-inf"))


@gluon.jit(do_not_specialize=["adjacent"])
def latent_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    items, gathered, adjacent, bounds, index, q, rows, out, lse, part_out, part_lse,
    q_strides, out_strides, q_start, group, scale, STRIDE: gl.constexpr, GATHERED: gl.constexpr, FIELDS: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Program (item): one item of work of a block with one KV head, by online softmax, as `attend_kernel`.

    `rows` are the latents, [S, 576] with `STRIDE` elements from one to the next. Rows and queries begin at multiples of
    16 bytes.
    """
    program = gl.program_id(0)
    item = items + program * FIELDS
    by_index = False
    if GATHERED:
        by_index = program >= adjacent
        if by_index:
            item = gathered + (program - adjacent) * FIELDS
    size = gl.load(item + 2)
    wait_for_inputs(EARLY)
    if size == 0:
        return
    block = LatentBlock(gl.load(item), gl.load(item + 1), size, q_start, group)
    columns = columns_of(gl.load(item + 4), gl.load(item + 5), gl.load(item + 6), gl.load(item + 7))
    source = LatentSource(rows, gl.load(item + 3), by_index, index)
    results = LatentResults(out, lse, part_out, part_lse, out_strides, gl.load(item + 8))
    tiles = allocate(q.dtype.element_ty)
    gl.warp_specialize(
        [
            (_first_group, (tiles, columns, block, bounds, scale, results)),
            (_second_group, (tiles, columns, block, bounds, scale, results)),
            (load_all, (tiles, columns, block, source, q, q_strides, STRIDE, GATHERED)),
        ],
        [4, 4], [232, 40],
    )  # fmt: skip


@gluon.jit
def _scores_left(tiles, WHICH: gl.constexpr, phase, at):  # type: ignore[no-untyped-def]
    """Begin the products of queries and the left half of a tile of keys; of the second tile the rest is with it."""
    scores = gl.zeros([ROWS, COLUMNS], gl.float32, _SCORES)
    mbarrier.wait(tiles.there[WHICH * 2], phase)
    fence_async_shared()
    keys = tiles.keys[WHICH * 2].index(at).permute((1, 0))
    scores = warpgroup_mma(tiles.queries[0].index(at), keys, scores, use_acc=False, is_async=True)
    if WHICH == 1:
        rest = tiles.rests[1].index(at).permute((1, 0))
        scores = warpgroup_mma(tiles.queries[2].index(at), rest, scores, is_async=True)
    return scores


@gluon.jit
def _scores_right(scores, tiles, WHICH: gl.constexpr, phase, at):  # type: ignore[no-untyped-def]
    """Begin to add the products of the right half; of the first tile the rest is with it."""
    mbarrier.wait(tiles.there[WHICH * 2 + 1], phase)
    fence_async_shared()
    keys = tiles.keys[WHICH * 2 + 1].index(at).permute((1, 0))
    scores = warpgroup_mma(tiles.queries[1].index(at), keys, scores, is_async=True)
    if WHICH == 0:
        rest = tiles.rests[0].index(at).permute((1, 0))
        scores = warpgroup_mma(tiles.queries[2].index(at), rest, scores, is_async=True)
    return scores


@gluon.jit
def _weights(  # type: ignore[no-untyped-def]
    scores, top, tile, limits, columns, scale, MASKED: gl.constexpr
):
    """(new maximum, factor for what was added before, weights)."""
    if MASKED:
        position = column_of(tile, columns) + gl.arange(0, COLUMNS, gl.SliceLayout(0, _SCORES))
        position = gl.expand_dims(position, 0)
        seen = (position >= gl.expand_dims(limits[0], 1)) & (position < gl.expand_dims(limits[1], 1))
        scores = gl.where(seen, scores, _NEVER)
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    base = new_top
    if MASKED:
        base = gl.where(new_top == _NEVER, 0.0, new_top)
    return new_top, gl.exp2(top - base), gl.exp2(scores * scale - gl.expand_dims(base, 1))


@gluon.jit
def _times(mixed, factor):  # type: ignore[no-untyped-def]
    """Results times a factor for each row."""
    return mixed * gl.expand_dims(gl.convert_layout(factor, _MIXED_ROW, assert_trivial=True), 1)


@gluon.jit
def _limits(block, columns, bounds):  # type: ignore[no-untyped-def]
    """The columns that each row sees: the first, and the one after the last."""
    row = gl.arange(0, ROWS, _SCORES_ROW)
    token = block.token + (block.first + row) // block.group
    low = gl.load(bounds + token * 2, mask=row < block.size, other=0)
    high = gl.load(bounds + token * 2 + 1, mask=row < block.size, other=0)
    return low, gl.minimum(high, columns.stop)


@gluon.jit
def _nothing():  # type: ignore[no-untyped-def]
    """The state over no columns: half of the results, maximum, sum of weights."""
    top = gl.full([ROWS], _NEVER, gl.float32, _SCORES_ROW)
    return gl.zeros([ROWS, HALF], gl.float32, _MIXED), top, gl.zeros([ROWS], gl.float32, _SCORES_ROW)


@gluon.jit
def _first_group(tiles, columns, block, bounds, scale, results):  # type: ignore[no-untyped-def]
    """The group of the left half of the results, and of the first tile of each pair."""
    limits = _limits(block, columns, bounds)
    mixed, top, total = _nothing()
    mbarrier.wait(tiles.asked, 0)
    scores = warpgroup_mma_wait(0, (_scores_right(_scores_left(tiles, 0, 0, 0), tiles, 0, 0, 0),))
    for pair in range(columns.full_pairs):
        scores, mixed, top, total = _first_step(
            scores, mixed, top, total, pair, limits, tiles, columns, scale, False
        )  # fmt: skip
    for pair in range(columns.full_pairs, columns.pairs):
        scores, mixed, top, total = _first_step(
            scores, mixed, top, total, pair, limits, tiles, columns, scale, True
        )  # fmt: skip
    _finish(mixed, top, total, 0, tiles, block, results)


@gluon.jit
def _first_step(  # type: ignore[no-untyped-def]
    scores, mixed, top, total, pair, limits, tiles, columns, scale, MASKED: gl.constexpr
):
    """A pair, given the scores of its first tile. Returns those of the next pair, which there need not be: results in
    registers of products under way are not safe across a branch."""
    phase = pair & 1
    at = index_of(pair)
    top, shrunk, weights = _weights(scores, top, pair * 2, limits, columns, scale, MASKED)
    narrow = weights.to(tiles.keys[0].dtype)
    tiles.tops[0].store(top)
    tiles.shrunks[0].store(shrunk)
    tiles.rests[0].index(0).store(narrow)
    fence_async_shared()
    mbarrier.arrive(tiles.weighed[0], count=1)
    mixed = _times(mixed, shrunk)
    mine = gl.convert_layout(narrow, _WEIGHTS)
    mixed = warpgroup_mma(mine, tiles.keys[0].index(at), mixed, is_async=True)
    total = total * shrunk + gl.sum(weights, 1)
    mixed, mine = warpgroup_mma_wait(0, (mixed, mine))
    mbarrier.arrive(tiles.used[0], count=1)

    mbarrier.wait(tiles.weighed[1], phase)
    top = tiles.tops[1].load(_SCORES_ROW)
    shrunk = tiles.shrunks[1].load(_SCORES_ROW)
    mixed = _times(mixed, shrunk)
    mixed = warpgroup_mma(tiles.rests[1].index(at), tiles.keys[2].index(at), mixed, is_async=True)
    left = _scores_left(tiles, 0, phase ^ 1, at)
    mixed = warpgroup_mma_wait(1, (mixed,))
    mbarrier.arrive(tiles.used[2], count=1)
    scores = warpgroup_mma_wait(0, (_scores_right(left, tiles, 0, phase ^ 1, at),))
    return scores, mixed, top, total * shrunk


@gluon.jit
def _second_group(tiles, columns, block, bounds, scale, results):  # type: ignore[no-untyped-def]
    """The group of the right half of the results, and of the second tile of each pair."""
    limits = _limits(block, columns, bounds)
    mixed, top, total = _nothing()
    mbarrier.wait(tiles.asked, 0)
    for pair in range(columns.full_pairs):
        mixed, top, total = _second_step(mixed, top, total, pair, limits, tiles, columns, scale, False)
    for pair in range(columns.full_pairs, columns.pairs):
        mixed, top, total = _second_step(mixed, top, total, pair, limits, tiles, columns, scale, True)
    _finish(mixed, top, total, 1, tiles, block, results)


@gluon.jit
def _second_step(  # type: ignore[no-untyped-def]
    mixed, top, total, pair, limits, tiles, columns, scale, MASKED: gl.constexpr
):
    """A pair: the second tile's scores while the first group computes weights, its weights while values are added."""
    phase = pair & 1
    at = index_of(pair)
    scores = warpgroup_mma_wait(0, (_scores_right(_scores_left(tiles, 1, phase, at), tiles, 1, phase, at),))
    mbarrier.wait(tiles.weighed[0], phase)
    shrunk = tiles.shrunks[0].load(_SCORES_ROW)
    top = tiles.tops[0].load(_SCORES_ROW)
    total *= shrunk
    mixed = _times(mixed, shrunk)
    mixed = warpgroup_mma(tiles.rests[0].index(at), tiles.keys[1].index(at), mixed, is_async=True)
    top, shrunk, weights = _weights(scores, top, pair * 2 + 1, limits, columns, scale, MASKED)
    narrow = weights.to(tiles.keys[0].dtype)
    tiles.tops[1].store(top)
    tiles.shrunks[1].store(shrunk)
    tiles.rests[1].index(0).store(narrow)
    fence_async_shared()
    mbarrier.arrive(tiles.weighed[1], count=1)
    total = total * shrunk + gl.sum(weights, 1)
    mixed = warpgroup_mma_wait(0, (mixed,))
    mbarrier.arrive(tiles.used[1], count=1)
    mixed = _times(mixed, shrunk)
    mine = gl.convert_layout(narrow, _WEIGHTS)
    mixed = warpgroup_mma(mine, tiles.keys[3].index(at), mixed, is_async=True)
    mixed, mine = warpgroup_mma_wait(0, (mixed, mine))
    mbarrier.arrive(tiles.used[3], count=1)
    return mixed, top, total


@gluon.jit
def _finish(mixed, top, total, SIDE: gl.constexpr, tiles, block, results):  # type: ignore[no-untyped-def]
    """Normalise and store half of the results. Rows that saw no column get out 0 and lse -inf."""
    tiles.totals[SIDE].store(total)
    mbarrier.arrive(tiles.summed[SIDE], count=1)
    mbarrier.wait(tiles.summed[1 - SIDE], 0)
    total += tiles.totals[1 - SIDE].load(_SCORES_ROW)
    nothing = total == 0.0
    logs = gl.where(nothing, _NEVER, (top + gl.log2(gl.where(nothing, 1.0, total))) * _LN_2)
    mixed = _times(mixed, gl.where(nothing, 0.0, 1.0 / gl.where(nothing, 1.0, total)))
    element = gl.expand_dims(SIDE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, _MIXED)), 0)
    row = gl.arange(0, ROWS, _SCORES_ROW)
    wide = gl.arange(0, ROWS, _MIXED_ROW)
    valid = gl.expand_dims(wide < block.size, 1) & (element >= 0)
    if results.partial < 0:
        if SIDE == 0:
            token, head = _token(block, row)
            gl.store(results.lse + token * results.out_strides[2] + head, logs, mask=row < block.size)
        token, head = _token(block, wide)
        whole = gl.expand_dims(token * results.out_strides[0] + head * results.out_strides[1], 1) + element
        gl.store(results.out + whole, mixed.to(results.out.dtype.element_ty), mask=valid)
    else:
        first = results.partial.to(gl.int64) * ROWS
        if SIDE == 0:
            gl.store(results.part_lse + first + row, logs, mask=row < block.size)
        gl.store(results.part_out + gl.expand_dims((first + wide) * (2 * HALF), 1) + element, mixed, mask=valid)


@gluon.jit
def _token(block, row):  # type: ignore[no-untyped-def]
    """The token and the query head of a packed row."""
    packed = block.first + row
    return (block.token + packed // block.group).to(gl.int64), block.q_head + packed % block.group
