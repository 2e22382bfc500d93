"""What the groups of warps of `latent.py` share: the work of an item, tiles in shared memory, and their loading."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

# Gluon of later versions of Triton, or of 3.6
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

ROWS = gl.constexpr(64)  # query rows of a program
COLUMNS = gl.constexpr(64)  # columns of a tile
HALF = gl.constexpr(256)  # elements of half a value
REST = gl.constexpr(64)  # elements of a key behind its value
THREADS = gl.constexpr(128)  # of a group of warps

SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_COPIES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 of a row
_COPIES_ROW = gl.constexpr(gl.SliceLayout(1, _COPIES.value))
_COPIES_ELEMENT = gl.constexpr(gl.SliceLayout(0, _COPIES.value))


class LatentBlock(NamedTuple):
    """The rows of an item: `Item.row`, `first` and `size`, their first query head and the heads of a token."""

    token: object
    first: object
    size: object
    q_head: object
    group: object


class LatentColumns(NamedTuple):
    """The columns of an item."""

    # as in `Item`
    start: object
    full_start: object
    full_stop: object
    stop: object
    # tiles that need no mask, and those before them that do
    full: object
    before: object
    # pairs of tiles that need no mask, and all pairs
    full_pairs: object
    pairs: object


class LatentSource(NamedTuple):
    """Where keys are."""

    # pointer to the rows
    rows: object
    # as in `Item`
    place: object
    # whether `place` counts in the index of slots, and the index
    by_index: object
    slots: object


class LatentTiles(NamedTuple):
    """Shared memory. A pair has two tiles, and a tile of keys a left half, a right half and a rest."""

    # left, right, rest
    queries: object
    # left and right of the first tile, left and right of the second
    keys: object
    # of the first and the second tile: the rest of the keys, and once scores are computed the weights
    rests: object
    # of the first and the second tile: the maximum of scores so far, and the factor for what was added before
    tops: object
    shrunks: object
    # sums of weights of the first and the second group
    totals: object
    # barriers: the queries are there
    asked: object
    # each part of `keys` is there, with the right one of the first tile and the left one of the second its rest
    there: object
    # each of them is not needed any more
    used: object
    # weights, maximum and factor of the first and the second tile are there
    weighed: object
    # the sums of each group are there
    summed: object


class LatentResults(NamedTuple):
    """Where results go, as in `attend_kernel`."""

    out: object
    lse: object
    part_out: object
    part_lse: object
    out_strides: object
    partial: object


@gluon.jit
def columns_of(start, full_start, full_stop, stop):  # type: ignore[no-untyped-def]
    """The tiles of an item. There is a pair even if there are no columns."""
    full = (full_stop - full_start) // COLUMNS
    before = gl.cdiv(full_start - start, COLUMNS)
    after = gl.cdiv(stop - full_stop, COLUMNS)
    pairs = gl.maximum(gl.cdiv(full + before + after, 2), 1)
    return LatentColumns(start, full_start, full_stop, stop, full, before, full // 2, pairs)


@gluon.jit
def column_of(tile, columns):  # type: ignore[no-untyped-def]
    """The first column of a tile; that of a tile too many is `stop`."""
    number = tile - columns.full
    after = columns.full_stop + (number - columns.before) * COLUMNS
    masked = gl.where(number < columns.before, columns.start + number * COLUMNS, after)
    return gl.where(tile < columns.full, columns.full_start + tile * COLUMNS, gl.minimum(masked, columns.stop))


@gluon.jit
def allocate(dtype: gl.constexpr):  # type: ignore[no-untyped-def]
    """Shared memory for elements of a dtype, with barriers that are ready. Threads must be synchronised afterwards."""
    return LatentTiles(
        (_tile(dtype, HALF), _tile(dtype, HALF), _tile(dtype, REST)),
        (_tile(dtype, HALF), _tile(dtype, HALF), _tile(dtype, HALF), _tile(dtype, HALF)),
        (_tile(dtype, REST), _tile(dtype, REST)),
        (_vector(), _vector()), (_vector(), _vector()), (_vector(), _vector()),
        _barrier(THREADS),
        (_barrier(THREADS), _barrier(THREADS), _barrier(THREADS), _barrier(THREADS)),
        (_barrier(1), _barrier(1), _barrier(1), _barrier(1)),
        (_barrier(1), _barrier(1)), (_barrier(1), _barrier(1)),
    )  # fmt: skip


@gluon.jit
def _tile(dtype: gl.constexpr, WIDTH: gl.constexpr):  # type: ignore[no-untyped-def]
    """Room for one tile, with one index: see `index_of`."""
    return gl.allocate_shared_memory(dtype, [1, COLUMNS, WIDTH], SHARED)


@gluon.jit
def _vector():  # type: ignore[no-untyped-def]
    return gl.allocate_shared_memory(gl.float32, [ROWS], _VECTOR)


@gluon.jit
def _barrier(COUNT: gl.constexpr):  # type: ignore[no-untyped-def]
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=COUNT)
    return bar


@gluon.jit
def index_of(pair):  # type: ignore[no-untyped-def]
    """0, but the compiler must not know it: it would compute descriptors of all parts of all tiles before the loop, and
    has no registers for them."""
    return pair >> 30


@gluon.jit
def load_all(  # type: ignore[no-untyped-def]
    tiles, columns, block, source, q, q_strides, STRIDE: gl.constexpr, GATHERED: gl.constexpr
):
    """The group that loads: queries, pairs of tiles, and the first tile of a pair that is not there."""
    row = block.first + gl.arange(0, ROWS, _COPIES_ROW)
    at = (block.token + row // block.group).to(gl.int64) * q_strides[0]
    at = gl.expand_dims(q + at + (block.q_head + row % block.group) * q_strides[1], 1)
    valid = gl.expand_dims(row < block.first + block.size, 1)
    element = gl.expand_dims(gl.arange(0, HALF, _COPIES_ELEMENT), 0)
    for half in gl.static_range(2):
        _copy(tiles.queries[half].index(0), at + (half * HALF + element), valid & (element < HALF))
    element = gl.expand_dims(gl.arange(0, REST, _COPIES_ELEMENT), 0)
    _copy(tiles.queries[2].index(0), at + (2 * HALF + element), valid & (element < REST))
    async_copy.mbarrier_arrive(tiles.asked, increment_count=False)
    for pair in range(columns.pairs):
        for which in gl.static_range(2):
            place, inside = _rows_at(column_of(pair * 2 + which, columns), columns.stop, source, STRIDE, GATHERED)
            for half in gl.static_range(2):
                mbarrier.wait(tiles.used[which * 2 + half], (pair & 1) ^ 1)
                _load(tiles, which * 2 + half, place, inside)
    place, inside = _rows_at(columns.stop, columns.stop, source, STRIDE, GATHERED)
    for half in gl.static_range(2):
        mbarrier.wait(tiles.used[half], (columns.pairs & 1) ^ 1)
        _load(tiles, half, place, inside)
    async_copy.wait_group(0)


@gluon.jit
def _rows_at(column, stop, source, STRIDE: gl.constexpr, GATHERED: gl.constexpr):  # type: ignore[no-untyped-def]
    """(pointers to the rows of a tile, which of them are before `stop`)."""
    column += gl.arange(0, COLUMNS, _COPIES_ROW)
    inside = column < stop
    slots = (source.place + column).to(gl.int64)
    if GATHERED:  # noqa: SIM102  # one test is of the compiler, the other of the device
        if source.by_index:
            slots = gl.load(source.slots + (source.place + column), mask=inside, other=0).to(gl.int64)
    return source.rows + slots * STRIDE, inside


@gluon.jit
def _load(tiles, PART: gl.constexpr, at, inside):  # type: ignore[no-untyped-def]
    """Load one part of `keys`, and with it the rest. There are zeros for rows that are not `inside`: memory there may
    be no numbers."""
    at, inside = gl.expand_dims(at, 1), gl.expand_dims(inside, 1)
    element = gl.expand_dims(gl.arange(0, HALF, _COPIES_ELEMENT), 0)
    _copy(tiles.keys[PART].index(0), at + (PART % 2 * HALF + element), inside & (element < HALF))
    if PART == 1 or PART == 2:
        element = gl.expand_dims(gl.arange(0, REST, _COPIES_ELEMENT), 0)
        _copy(tiles.rests[PART // 2].index(0), at + (2 * HALF + element), inside & (element < REST))
    async_copy.mbarrier_arrive(tiles.there[PART], increment_count=False)
