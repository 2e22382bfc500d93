"""How a kernel is shaped for given heads and rows: tiles, warps and stages, from a table instead of trials at run time.

It owns the table; what the compiler says of every row of it, registers and shared memory, is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

Parts = tuple[int, int, int, int]  # elements of the main part, its tile (a power of two), of the rest, its tile


@dataclass(frozen=True)
class Shape:
    """What the rows of one launch are, widths in elements.

    A row is a main part and a rest, so that 576 takes tiles of 512 and 64 instead of 1,024. `groups` are scales of
    a row, 0 without; `shared` values are the first elements of the keys' rows; `wide` products are in fp32.
    """

    key: Parts
    value: Parts
    groups: int
    shared: bool
    wide: bool


@dataclass(frozen=True)
class Config:
    """Rows and columns of a tile; warps of a program; tiles in flight; programs on a processor; transposed tiles.

    Transposed, keys lie along the 64 rows that the matrix instructions of a warp group have at least, and few query
    rows along its columns: nothing is computed for padding, and keys and values are read from shared memory. It needs
    64 columns, and elements that need no conversion.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    resident: int
    flip: bool


def shape_of(key_dim: int, value_dim: int, groups: tuple[int, ...], shared: bool, wide: bool) -> Shape:
    """Raises ValueError if the scales' groups are more than two."""
    if len(groups) > 2:
        raise ValueError(f"{len(groups)} groups of scales in a row; the kernel reads at most two")
    halves = groups[0] if len(groups) == 2 else None
    key = _parts(key_dim, halves)
    if not shared:
        value = _parts(value_dim, halves)
    elif value_dim <= key[0]:
        value = (key[0], key[1], 0, 0)
    else:
        value = key
    return Shape(key, value, len(groups), shared, wide)


def config_for(shape: Shape, rows: int) -> Config:
    """The tiles for runs of up to `rows` rows (tokens × query heads of a KV head)."""
    width = max(shape.key[0] + shape.key[2], shape.value[0] + shape.value[2])
    if shape.wide:
        return Config(16, 32 if width <= 64 else 16, 4, 2, 1, False)
    if width > 256:
        return _latent(shape, rows)
    if rows <= 32 and not shape.groups:
        columns, stages, resident = (128, 3, 2) if width <= 64 else (64, 3, 2) if width <= 128 else (64, 2, 1)
        return Config(16 if rows <= 16 else 32, columns, 4, stages, resident, True)
    if rows <= 16:
        return Config(16, 64 if width <= 128 else 32, 4, 3, 2, False)
    columns = 64 if width <= 192 else 32
    if rows <= 64:
        return Config(64, columns, 4, 3 if width <= 128 else 2, 2, False)
    return Config(128, columns, 8, 3 if width <= 128 else 2, 1, False)


def _latent(shape: Shape, rows: int) -> Config:
    """A row of 512 values takes half of the registers for 32 query rows, and a tile of 64 a third of shared memory."""
    if shape.groups:
        return Config(16, 32, 4, 3, 2, False) if rows <= 16 else Config(64, 32, 8, 2, 1, False)
    return Config(16 if rows <= 16 else 32, 64, 4, 2, 1, True)


def _parts(dim: int, cut: int | None) -> Parts:
    main = cut or 1 << (dim.bit_length() - 1)
    return main, _tile(main), dim - main, _tile(dim - main)


def _tile(dim: int) -> int:
    """Tensor cores multiply at least 16 elements at a time."""
    return max(16, 1 << (dim - 1).bit_length()) if dim else 0
