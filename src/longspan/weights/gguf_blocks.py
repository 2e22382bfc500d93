"""Rows of a GGUF tensor as codes, scales and offsets, in which the numbers that they stand for are not computed yet.

It owns the layouts of GGUF's blocks (ggml-quants.h); it must not know files, nor how a model uses a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from longspan.compiled.blocks import QuantisedBlocks

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]
_SUPER = 256  # elements of a block of the K-quants, which has several scales
_SCALE_BYTES = 12  # of the eight scales and offsets of 6 bits each


class _Unpacked(NamedTuple):
    """Blocks of a file [n, bytes], unpacked: each has k scales, each for adjacent elements."""

    # int8 [n, elements]
    codes: NDArray[np.int8]
    # [n, k]
    scales: _Floats
    # [n, k]; None if all are 0
    offsets: _Floats | None = None


class _Layout(NamedTuple):
    """How a type of tensor is stored."""

    # of a code, once it is unpacked
    bits: int
    # elements that share a scale
    block_width: int
    # blocks uint8 [n, bytes] → their content
    unpack: Callable[[_Bytes], _Unpacked]


def _halves(fields: _Bytes) -> _Floats:
    """fp16 numbers as fp32 [n, numbers]."""
    return np.ascontiguousarray(fields).view(np.float16).astype(np.float32)


def _nibbles(fields: _Bytes, group: int = 16) -> NDArray[np.int8]:
    """[n, bytes] → [n, 2 · bytes]: of each `group` of bytes the low halves, then the high halves."""
    grouped = fields.reshape(len(fields), -1, 1, group)
    halves = np.concatenate([grouped & 15, grouped >> 4], axis=2)
    return halves.reshape(len(fields), -1).astype(np.int8)


def _fifth_bits(fields: _Bytes) -> NDArray[np.int8]:
    """Four bytes [n, 4] → the 32 bits, 0 or 16 [n, 32]."""
    return np.unpackbits(fields, axis=1, bitorder="little").astype(np.int8) * np.int8(16)


def _q4_0(blocks: _Bytes) -> _Unpacked:
    return _Unpacked(_nibbles(blocks[:, 2:]) - np.int8(8), _halves(blocks[:, :2]))


def _q4_1(blocks: _Bytes) -> _Unpacked:
    return _Unpacked(_nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _q5_0(blocks: _Bytes) -> _Unpacked:
    codes = _nibbles(blocks[:, 6:]) + _fifth_bits(blocks[:, 2:6]) - np.int8(16)
    return _Unpacked(codes, _halves(blocks[:, :2]))


def _q5_1(blocks: _Bytes) -> _Unpacked:
    codes = _nibbles(blocks[:, 8:]) + _fifth_bits(blocks[:, 4:8])
    return _Unpacked(codes, _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _q8_0(blocks: _Bytes) -> _Unpacked:
    return _Unpacked(np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _halves(blocks[:, :2]))


def _k_scales(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """The eight scales and offsets [n, 8] of Q4_K and Q5_K: two fp16 factors, and 6 bits for each of the sixteen."""
    low, middle, high = np.split(blocks[:, 4 : 4 + _SCALE_BYTES], 3, axis=1)
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 2 & 48)], axis=1)
    return _halves(blocks[:, :2]) * scales.astype(np.float32), -(_halves(blocks[:, 2:4]) * offsets.astype(np.float32))


def _q4_k(blocks: _Bytes) -> _Unpacked:
    return _Unpacked(_nibbles(blocks[:, 4 + _SCALE_BYTES :], 32), *_k_scales(blocks))


def _q5_k(blocks: _Bytes) -> _Unpacked:
    fifth, rest = np.split(blocks[:, 4 + _SCALE_BYTES :], [_SUPER // 8], axis=1)
    shifted = fifth[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit i is of the i-th 32 elements
    codes = _nibbles(rest, 32) + shifted.reshape(len(blocks), -1).astype(np.int8) * np.int8(16)
    return _Unpacked(codes, *_k_scales(blocks))


def _q6_k(blocks: _Bytes) -> _Unpacked:
    low, high, scales, factor = np.split(blocks, np.cumsum([_SUPER // 2, _SUPER // 4, _SUPER // 16]), axis=1)
    pairs = high.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    codes = _nibbles(low, 64) + pairs.reshape(len(blocks), -1).astype(np.int8) * np.int8(16) - np.int8(32)
    return _Unpacked(codes, _halves(factor) * np.ascontiguousarray(scales).view(np.int8).astype(np.float32))


_LAYOUTS: Mapping[GGMLQuantizationType, _Layout] = MappingProxyType({
    GGMLQuantizationType.Q4_0: _Layout(4, 32, _q4_0),
    GGMLQuantizationType.Q4_1: _Layout(4, 32, _q4_1),
    GGMLQuantizationType.Q5_0: _Layout(8, 32, _q5_0),
    GGMLQuantizationType.Q5_1: _Layout(8, 32, _q5_1),
    GGMLQuantizationType.Q8_0: _Layout(8, 32, _q8_0),
    GGMLQuantizationType.Q4_K: _Layout(4, 32, _q4_k),
    GGMLQuantizationType.Q5_K: _Layout(8, 32, _q5_k),
    GGMLQuantizationType.Q6_K: _Layout(8, 16, _q6_k),
})  # fmt: skip


def block_width_of(kind: GGMLQuantizationType) -> int | None:
    """Elements that share a scale in tensors of a type; None if they are only read dequantised."""
    return _LAYOUTS[kind].block_width if kind in _LAYOUTS else None


def unpacked(rows: _Bytes, kind: GGMLQuantizationType) -> QuantisedBlocks:
    """Rows of a tensor [rows, bytes] of a type that has a block size."""
    layout, (elements, size) = _LAYOUTS[kind], GGML_QUANT_SIZES[kind]
    found = layout.unpack(rows.reshape(-1, size))
    shape = len(rows), rows.shape[1] // size * elements
    codes = torch.from_numpy(found.codes.reshape(shape))
    scales = torch.from_numpy(found.scales).view(len(rows), -1)
    offsets = None if found.offsets is None else torch.from_numpy(found.offsets).view(len(rows), -1)
    return QuantisedBlocks(codes, scales, offsets, layout.bits, layout.block_width)
