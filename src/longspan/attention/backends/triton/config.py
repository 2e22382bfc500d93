"""The launch configuration of the attention kernel: tiles, warps and stages, by chip, widths and number of rows.

It owns this table, which replaces autotuning at run time. A test compiles every entry and checks its registers and
shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# whether a product and a sum are rounded once, as one instruction. Said at each launch: Triton 3.10 has another default
FUSED = True
# partial results that a program merges at once
PARTS = 32
# elements of these: 32 for each of 128 threads
_MERGED = 4096
# elements of a row's main part, width of its tile (a power of two), elements of the rest, width of its tile
Parts = tuple[int, int, int, int]


@dataclass(frozen=True)
class Shape:
    """The cached rows that one launch reads.

    A row has a main part and a rest, so that 576 elements take tiles of 512 and 64 instead of one of 1,024.
    """

    # widths of a key
    key: Parts
    # widths of a value
    value: Parts
    # scales of a row; 0 if it is not quantised
    groups: int
    # whether a value is the first elements of its key, so that one tile is read for both
    shared: bool
    # whether queries are fp32, and so products are
    wide: bool


# what `latent.py` computes: DeepSeek's latents
SPECIALISED = Shape((512, 512, 64, 64), (512, 512, 0, 0), 0, True, False)


class Chip(Enum):
    """A kind of device, by the bytes of shared memory that one program can have."""

    # Hopper and B200, whose matrix instructions are those of a warp group
    LARGE = 227 * 1024
    # A100
    MEDIUM = 163 * 1024
    # L40S, RTX 30, 40 and 50
    SMALL = 99 * 1024

    @staticmethod
    def with_shared(size: int) -> Chip:
        """The largest kind that a device with `size` bytes is."""
        return next((chip for chip in Chip if size >= chip.value), Chip.SMALL)


@dataclass(frozen=True)
class Config:
    """The launch configuration for one shape and number of rows."""

    # query rows of a tile
    block_m: int
    # columns (cached tokens) of a tile
    block_n: int
    # warps of a program
    warps: int
    # tiles that are loaded ahead
    stages: int
    # programs that run on one processor at a time
    resident: int
    # whether tiles are transposed. The matrix instructions of a warp group have at least 64 rows: keys are then these
    # rows, and the query rows, if they are few, are columns, so that no padding is computed. Keys and values are read
    # from shared memory. Needs 64 columns, and elements that are not converted
    flip: bool
    # whether two warp groups with 64 rows divide the columns of a tile. Otherwise both compute all scores
    split: bool = False
    # whether the last program that has computed a part of some rows merges the parts, in place of a reduction: for rows
    # so few that one program merges them quickly
    merges: bool = False
    # whether `latent.py` computes it, whose groups of warps do different things; `warps` are then those of a group
    specialised: bool = False


def shape_of(key_dim: int, value_dim: int, groups: tuple[int, ...], shared: bool, wide: bool) -> Shape:
    """The shape of rows with these widths.

    Raises ValueError for several scale groups, but for two in latents of which the first is a power of two wide: with
    a narrower one the kernel is right in Triton's interpreter and wrong on an H100 (Triton 3.6).
    """
    if len(groups) > 1 and not (len(groups) == 2 and shared and groups[0] & (groups[0] - 1) == 0):
        raise ValueError(f"groups of scales of widths {groups}; the kernel reads one, or two of a latent")
    halves = groups[0] if len(groups) == 2 else None
    key = _parts(key_dim, halves)
    if not shared:
        value = _parts(value_dim, halves)
    elif value_dim <= key[0]:
        value = (key[0], key[1], 0, 0)
    else:
        value = key
    return Shape(key, value, len(groups), shared, wide)


def config_for(shape: Shape, rows: int, chip: Chip = Chip.LARGE, specialised: bool = False) -> Config:
    """The configuration for runs of up to `rows` rows, where rows are tokens · query heads of a KV head.

    `specialised` if `latent.py` may compute the shape that it is made for.
    """
    width = max(shape.key[0] + shape.key[2], shape.value[0] + shape.value[2])
    if shape.wide:
        stages = 1 if chip is Chip.SMALL and width > 256 else 2
        return Config(16, 32 if width <= 64 else 16, 4, stages, 1, False)
    if width > 256:
        if specialised and rows >= 64 and shape == SPECIALISED:
            return Config(64, 64, 4, 1, 1, False, specialised=True)
        return _latent(shape, rows, chip)
    if rows <= 32 and not shape.groups:
        return _decode(width, 16 if rows <= 16 else 32, chip)
    if rows <= 16:
        return Config(16, 64 if width <= 128 else 32, 4, 3, 2, False, merges=True)
    return _middle(width, chip) if rows <= 64 else _prefill(shape, width, chip)


def rows_at_once(config: Config, width: int) -> int:
    """How many rows of `width` values a program merges at once."""
    return min(config.block_m, max(1, _MERGED // (PARTS << (width - 1).bit_length())))


def _decode(width: int, block_m: int, chip: Chip) -> Config:
    """The configuration for a few rows that are not quantised: the more columns are on their way, the better."""
    if chip is Chip.LARGE:
        columns, stages, resident = (128, 3, 2) if width <= 64 else (64, 3, 2) if width <= 128 else (64, 2, 1)
    elif chip is Chip.MEDIUM:
        columns, stages, resident = (128, 3, 2) if width <= 64 else (64, 3, 2) if width <= 128 else (64, 3, 1)
    else:
        columns, stages, resident = (64, 3, 2) if width <= 64 else (32, 3, 2) if width <= 128 else (32, 3, 1)
    return Config(block_m, columns, 4, stages, resident, chip is Chip.LARGE, merges=True)


def _middle(width: int, chip: Chip) -> Config:
    """The configuration for up to 64 rows: drafts, or one token of many heads."""
    if chip is Chip.LARGE:
        return Config(64, 64 if width <= 192 else 32, 4, 3 if width <= 128 else 2, 2, False)
    if chip is Chip.MEDIUM:
        return Config(64, 32, 4, 3, 2 if width <= 128 else 1, False)
    return Config(64, 32, 4, 2, 2 if width <= 128 else 1, False)


def _prefill(shape: Shape, width: int, chip: Chip) -> Config:
    """The configuration for many rows."""
    if chip is Chip.SMALL and width > 128:
        return Config(128, 32, 8, 2, 1, False) if width <= 192 else Config(64, 32, 4, 2, 1, False)
    if chip is Chip.LARGE and 64 < width <= 128 and not shape.groups:
        return Config(128, 128, 8, 3, 1, False)
    return Config(128, 64 if width <= 192 else 32, 8, 3 if width <= 128 else 2, 1, False)


def _latent(shape: Shape, rows: int, chip: Chip) -> Config:
    """The configuration for latents: 32 query rows of 512 values take half of all registers, so tiles are small.

    A tile of 64 columns takes a third of the largest shared memory.
    """
    if shape.groups:
        if rows <= 16:
            return Config(16, 32, 4, 3, 2 if chip is Chip.LARGE else 1, False)
        return Config(32, 32, 4, 2, 1, False) if chip is Chip.SMALL else Config(64, 32, 8, 2, 1, False)
    if chip is Chip.LARGE:
        if rows >= 64:
            return Config(64, 64, 8, 2, 1, False, split=True)
        return Config(16 if rows <= 16 else 32, 64, 4, 2, 1, True)
    if chip is Chip.MEDIUM:
        return Config(64, 32, 8, 3, 1, False) if rows >= 64 else Config(16 if rows <= 16 else 32, 32, 4, 3, 1, False)
    return Config(16, 32, 4, 3, 1, False) if rows <= 16 else Config(32, 32, 4, 2, 1, False)


def _parts(dim: int, cut: int | None) -> Parts:
    """Divide `dim` elements into the largest power of two and the rest, or at `cut`."""
    main = cut or 1 << (dim.bit_length() - 1)
    return main, _tile(main), dim - main, _tile(dim - main)


def _tile(dim: int) -> int:
    """The width of a tile for `dim` elements: a power of two, at least 16 for tensor cores; 0 for no elements."""
    return max(16, 1 << (dim - 1).bit_length()) if dim else 0
