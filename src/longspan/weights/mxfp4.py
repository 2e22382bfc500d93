"""MXFP4 tensors (OCP Microscaling 1.0) of stacked experts, dequantised as they are read.

It owns the format; another checkpoint reads the files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import WeightError
from longspan.weights.checkpoint import Checkpoint

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32  # values that share a scale
_BIAS = 127  # exponent bias of a scale
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Mxfp4Checkpoint:
    """A checkpoint whose MXFP4 tensors appear under one name each, dequantised; other tensors are passed through.

    The files hold `NAME_blocks` uint8 [experts, out, in / 32, 16] and `NAME_scales` uint8 [experts, out, in / 32]. They
    are read as tensor NAME [experts, in, out]. A byte holds two values, the low half first. A scale is the exponent of
    a power of two.
    """

    def __init__(self, files: Checkpoint) -> None:
        self._files = files

    def names(self) -> frozenset[str]:
        """See `Checkpoint.names`."""
        names = self._files.names()
        packed = {n.removesuffix(_BLOCKS) for n in names if n.endswith(_BLOCKS)}
        return frozenset(n for n in names if not self._is_part(n, packed)) | packed

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint.shape`."""
        if not self._is_packed(name):
            return self._files.shape(name)
        experts, rows, blocks, _ = self._files.shape(name + _BLOCKS)
        if self._files.shape(name + _SCALES) != (experts, rows, blocks):
            raise WeightError(
                f"{name + _SCALES}: shape {self._files.shape(name + _SCALES)} in the checkpoint, "
                f"{(experts, rows, blocks)} expected from {name + _BLOCKS}; download it again"
            )
        return experts, blocks * _BLOCK, rows

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """See `Checkpoint.read`."""
        if not self._is_packed(name):
            self._files.read(name, index, out)
            return
        for expert in range(index[0].start, index[0].stop):
            whole = self._expert(name, slice(expert, expert + 1), index[1], index[2])
            out[expert - index[0].start].copy_(whole.t())

    def _expert(self, name: str, expert: slice, columns: slice, rows: slice) -> Tensor:
        """A slice of one expert, dequantised: fp32 [rows, columns], where rows are outputs and columns inputs.

        Whole blocks are read and cut to `columns` afterwards.
        """
        first, stop = columns.start // _BLOCK, -(-columns.stop // _BLOCK)
        packed = torch.empty(1, rows.stop - rows.start, stop - first, _BLOCK // 2, dtype=torch.uint8)
        scales = torch.empty(packed.shape[:-1], dtype=torch.uint8)
        blocks = slice(first, stop)
        self._files.read(name + _BLOCKS, (expert, rows, blocks, slice(0, _BLOCK // 2)), packed)
        self._files.read(name + _SCALES, (expert, rows, blocks), scales)
        halves = torch.stack((packed[0] & 15, packed[0] >> 4), dim=-1).flatten(2).long()
        values = torch.ldexp(torch.tensor(_VALUES)[halves], scales[0, ..., None].int() - _BIAS).flatten(1)
        return values[:, columns.start - first * _BLOCK : columns.stop - first * _BLOCK]

    def _is_packed(self, name: str) -> bool:
        return name + _BLOCKS in self._files.names()

    @staticmethod
    def _is_part(name: str, packed: set[str]) -> bool:
        return any(name.endswith(end) and name.removesuffix(end) in packed for end in (_BLOCKS, _SCALES))
