"""A rank's slices of a checkpoint, as the tensors its model asks for.

It owns the way from logical axes to byte ranges, and sharing between ranks of one process; it must
not know file formats or architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from longspan.models.layers import Linear
from longspan.models.params import Param
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import Checkpoint

T = TypeVar("T")
Piece = tuple[str, tuple[slice, ...]]
_Key = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


class TensorStore:
    """Tensors by name and slice: ranks of one process that need the same slice share one copy.

    Loading is serial: one tensor is being converted at any time.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._tensors: dict[_Key, Tensor] = {}
        self._linears: dict[_Key, Linear] = {}
        self._lock = Lock()

    def tensor(self, pieces: Sequence[Piece], exact: bool = False) -> Tensor:
        """The slices, concatenated along dim 0 if there are several; in fp32 if `exact`."""
        dtype = torch.float32 if exact else self._dtype
        with self._lock:
            return _once(self._tensors, pieces, lambda wanted: self._read(wanted, dtype))

    def linear(self, pieces: Sequence[Piece]) -> Linear:
        """The slices as the weight of products; the plain tensor is dropped once it is packed."""
        with self._lock:
            return _once(self._linears, pieces, lambda wanted: Linear(self._read(wanted, self._dtype)))

    def _read(self, pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
        rows = [index[0].stop - index[0].start for _, index in pieces]
        rest = [part.stop - part.start for part in pieces[0][1][1:]]
        whole = torch.empty(sum(rows), *rest, dtype=dtype)
        for (name, index), out in zip(pieces, torch.split(whole, rows), strict=True):
            self._checkpoint.read(name, index, out)
        return whole


def _once(made: dict[_Key, T], pieces: Sequence[Piece], make: Callable[[Sequence[Piece]], T]) -> T:
    key = tuple((name, tuple((part.start, part.stop) for part in index)) for name, index in pieces)
    if key not in made:
        made[key] = make(pieces)
    return made[key]


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
        exact = any(param.exact for param in params)
        return self._store.tensor([(param.name, self._index(param)) for param in params], exact)

    def linear(self, *params: Param) -> Linear:
        """The same, as the weight of products."""
        return self._store.linear([(param.name, self._index(param)) for param in params])

    def _index(self, param: Param) -> tuple[slice, ...]:
        index: list[slice] = []
        for size, axis in zip(param.shape, param.axes, strict=True):
            if axis is None:
                index.append(slice(0, size))
            else:
                start, stop = self.extent(axis, size // param.unit)
                index.append(slice(start * param.unit, stop * param.unit))
        return tuple(index)
