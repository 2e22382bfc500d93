"""MXFP4 tensors (OCP Microscaling 1.0) of stacked experts, dequantised as they are read, or as they are.

It owns their names; another checkpoint reads the files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.compiled.mxfp4 import BLOCK, mxfp4_numbers
from longspan.errors import WeightError
from longspan.weights.checkpoint import Checkpoint

_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4Checkpoint:
    """A checkpoint whose MXFP4 tensors appear under one name each, dequantised; other tensors are passed through.

    The files hold `NAME_blocks` uint8 [experts, out, in / 32, 16] and `NAME_scales` uint8 [experts, out, in / 32]. They
    are read as tensor NAME [experts, in, out].
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
        if not self.is_packed(name):
            return self._files.shape(name)
        experts, rows, blocks, _ = self._files.shape(name + _BLOCKS)
        if self._files.shape(name + _SCALES) != (experts, rows, blocks):
            raise WeightError(
                f"{name + _SCALES}: shape {self._files.shape(name + _SCALES)} in the checkpoint, "
                f"{(experts, rows, blocks)} expected from {name + _BLOCKS}; download it again"
            )
        return experts, blocks * BLOCK, rows

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """See `Checkpoint.read`."""
        if not self.is_packed(name):
            self._files.read(name, index, out)
            return
        for expert in range(index[0].start, index[0].stop):
            whole = self._expert(name, slice(expert, expert + 1), index[1], index[2])
            out[expert - index[0].start].copy_(whole.t())

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is in MXFP4."""
        return name + _BLOCKS in self._files.names()

    def read_packed(self, name: str, index: tuple[slice, ...], values: Tensor, scales: Tensor) -> None:
        """Copy a slice of one expert of an MXFP4 tensor without dequantising it.

        `index` is as in `read`; inputs begin and end between blocks. `values` is uint8 [out, in / 2] and `scales` uint8
        [out, in / 32], of the slice.
        """
        expert, columns, rows = index
        blocks = slice(columns.start // BLOCK, columns.stop // BLOCK)
        halves = (expert, rows, blocks, slice(0, BLOCK // 2))
        self._files.read(name + _BLOCKS, halves, values.view(1, len(values), -1, BLOCK // 2))
        self._files.read(name + _SCALES, (expert, rows, blocks), scales[None])

    def _expert(self, name: str, expert: slice, columns: slice, rows: slice) -> Tensor:
        """A slice of one expert, dequantised: fp32 [rows, columns], where rows are outputs and columns inputs.

        Whole blocks are read and cut to `columns` afterwards.
        """
        first, stop = columns.start // BLOCK * BLOCK, -(-columns.stop // BLOCK) * BLOCK
        packed = torch.empty(rows.stop - rows.start, (stop - first) // 2, dtype=torch.uint8)
        scales = torch.empty(len(packed), (stop - first) // BLOCK, dtype=torch.uint8)
        self.read_packed(name, (expert, slice(first, stop), rows), packed, scales)
        return mxfp4_numbers(packed, scales)[:, columns.start - first : columns.stop - first]

    @staticmethod
    def _is_part(name: str, packed: set[str]) -> bool:
        return any(name.endswith(end) and name.removesuffix(end) in packed for end in (_BLOCKS, _SCALES))
