"""A rank's slices of a checkpoint, as the tensors its model asks for.

It owns the way from logical axes to byte ranges, and sharing between ranks of one process; it must
not know file formats or architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from longspan.models.params import Param
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import Checkpoint

_Key = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


class TensorStore:
    """Tensors by name and slice: ranks of one process that need the same slice share one copy.

    Loading is serial: one tensor is being converted at any time.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._tensors: dict[_Key, Tensor] = {}
        self._lock = Lock()

    def get(self, pieces: Sequence[tuple[str, tuple[slice, ...]]]) -> Tensor:
        """The slices, concatenated along dim 0 if there are several."""
        key = tuple((name, tuple((part.start, part.stop) for part in index)) for name, index in pieces)
        with self._lock:
            if key not in self._tensors:
                self._tensors[key] = self._read(pieces)
            return self._tensors[key]

    def _read(self, pieces: Sequence[tuple[str, tuple[slice, ...]]]) -> Tensor:
        rows = [index[0].stop - index[0].start for _, index in pieces]
        rest = [part.stop - part.start for part in pieces[0][1][1:]]
        whole = torch.empty(sum(rows), *rest, dtype=self._dtype)
        for (name, index), out in zip(pieces, torch.split(whole, rows), strict=True):
            self._checkpoint.read(name, index, out)
        return whole


class RankLoader:
    """What a model loads through: parameters in, this rank's part of them out."""

    def __init__(self, store: TensorStore, sharding: Sharding) -> None:
        self._store = store
        self._sharding = sharding

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of a logical axis."""
        return self._sharding.extent(axis, size)

    def load(self, *params: Param) -> Tensor:
        """This rank's slice of each parameter, concatenated along dim 0."""
        return self._store.get([(param.name, self._index(param)) for param in params])

    def _index(self, param: Param) -> tuple[slice, ...]:
        index: list[slice] = []
        for size, axis in zip(param.shape, param.axes, strict=True):
            if axis is None:
                index.append(slice(0, size))
            else:
                start, stop = self.extent(axis, size // param.unit)
                index.append(slice(start * param.unit, stop * param.unit))
        return tuple(index)
