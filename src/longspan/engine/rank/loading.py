"""A rank's slices of a checkpoint, as the tensors its model asks for.

It owns the way from logical axes to byte ranges, and sharing between ranks of one process; it must
not know file formats or architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from longspan.engine.rank.scaled_weights import ScaledWeights
from longspan.models.context import Linear
from longspan.models.layers import DenseLinear
from longspan.models.params import Bounds, Param, loaded_shape
from longspan.models.scaled import BLOCK, BlockScaled, BlockScaledLinear
from longspan.parallel.sharding import Sharding
from longspan.weights.checkpoint import Checkpoint

T = TypeVar("T")
_Key = tuple["WeightPiece", ...]


class WeightPiece(NamedTuple):
    """A slice of a tensor: [start, stop) of each dimension; of a `stacked` one an entry, to be transposed."""

    name: str
    bounds: Bounds
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is loaded."""
        return loaded_shape(self.bounds, self.stacked)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slice of each dimension."""
        return tuple(slice(start, stop) for start, stop in self.bounds)

    @property
    def is_whole_blocks(self) -> bool:
        """Whether no block with a scale of its own is cut."""
        return not self.stacked and all(bound % BLOCK == 0 for bounds in self.bounds for bound in bounds)

    def read(self, checkpoint: Checkpoint, out: Tensor) -> None:
        """Into `out`, which has `shape`."""
        target = out.permute(*reversed(range(out.dim())))[None] if self.stacked else out
        checkpoint.read(self.name, self.slices, target)


class TensorStore:
    """Tensors by name and slice: ranks of one process that need the same slice share one copy.

    Loading is serial: one tensor is being converted at any time. Weights of products that are in `scaled`, in whole
    blocks, are kept as they are there.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = torch.device("cpu"),
        scaled: ScaledWeights | None = None,
    ) -> None:  # fmt: skip
        self.device = device
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._scaled = scaled
        self._tensors: dict[_Key, Tensor] = {}
        self._linears: dict[_Key, Linear] = {}
        self._lock = Lock()

    def tensor(self, pieces: Sequence[WeightPiece], exact: bool = False) -> Tensor:
        """The slices, concatenated along dim 0 if there are several; in fp32 if `exact`."""
        dtype = torch.float32 if exact else self._dtype
        with self._lock:
            return _once(self._tensors, pieces, lambda wanted: self._read(wanted, dtype))

    def linear(self, pieces: Sequence[WeightPiece]) -> Linear:
        """The slices as the weight of products; the plain tensor is dropped once it is packed."""
        with self._lock:
            return _once(self._linears, pieces, self._linear)

    def _linear(self, pieces: Sequence[WeightPiece]) -> Linear:
        kept = self._scaled
        if kept and all(piece.is_whole_blocks and kept.checkpoint.has_scales(piece.name) for piece in pieces):
            return BlockScaledLinear(self._read_scaled(kept, pieces), kept.fused)
        return DenseLinear(self._read(pieces, self._dtype))

    def _read(self, pieces: Sequence[WeightPiece], dtype: torch.dtype) -> Tensor:
        rows = [piece.shape[0] for piece in pieces]
        whole = torch.empty(sum(rows), *pieces[0].shape[1:], dtype=dtype)
        for piece, out in zip(pieces, torch.split(whole, rows), strict=True):
            piece.read(self._checkpoint, out)
        return whole.to(self.device)

    def _read_scaled(self, kept: ScaledWeights, pieces: Sequence[WeightPiece]) -> BlockScaled:
        rows, columns = [piece.shape[0] for piece in pieces], pieces[0].shape[1]
        values = torch.empty(sum(rows), columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(sum(rows) // BLOCK, columns // BLOCK)
        blocks = torch.split(scales, [count // BLOCK for count in rows])
        for piece, part, part_scales in zip(pieces, torch.split(values, rows), blocks, strict=True):
            kept.checkpoint.read_scaled(piece.name, piece.slices, part, part_scales)
        return BlockScaled(values.to(self.device), scales.to(self.device))


def _once(made: dict[_Key, T], pieces: Sequence[WeightPiece], make: Callable[[Sequence[WeightPiece]], T]) -> T:
    key = tuple(pieces)
    if key not in made:
        made[key] = make(pieces)
    return made[key]


class RankLoader:
    """What a model loads through: parameters in, this rank's part of them out."""

    def __init__(self, store: TensorStore, sharding: Sharding) -> None:
        self._store = store
        self._sharding = sharding

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._store.device

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of a logical axis."""
        return self._sharding.extent(axis, size)

    def load(self, *params: Param) -> Tensor:
        """This rank's slice of each parameter, concatenated along dim 0."""
        exact = any(param.exact for param in params)
        return self._store.tensor([self._piece(param) for param in params], exact)

    def linear(self, *params: Param) -> Linear:
        """The same, as the weight of products."""
        return self._store.linear([self._piece(param) for param in params])

    def _piece(self, param: Param) -> WeightPiece:
        return WeightPiece(param.name, param.bounds(self.extent), param.stacked is not None)
