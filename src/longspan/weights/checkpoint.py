"""The interface through which weights are read, whatever the format of the files.

It owns the interface; it must not know formats, architectures or ranks.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Protocol, runtime_checkable
from zlib import crc32

import torch
from torch import Tensor

from longspan.compiled.blocks import QuantisedBlocks
from longspan.errors import WeightError

_SMALL = 1e-3


class Checkpoint(Protocol):
    """Named tensors on disk. Names are those of Hugging Face's implementation of the model."""

    def names(self) -> frozenset[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises `WeightError` if no tensor has this name."""

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """Copy `tensor[index]` into `out`, which has the slice's shape, and convert it to the dtype of `out`.

        `index` has one slice with start and stop for each dimension. Where the format permits, only the slice is read
        from the file, and at most one block of it is held in memory besides `out`.
        """


@runtime_checkable
class BlockCheckpoint(Protocol):
    """A checkpoint of which some tensors can be read without computing the numbers that their codes stand for."""

    def block_width(self, name: str) -> int | None:
        """Adjacent elements of a row that share a scale; None if the tensor has no such form."""

    def read_blocks(self, name: str, index: tuple[slice, ...]) -> QuantisedBlocks:
        """`tensor[index]` of a matrix [out, in] that has a block width, whose columns begin and end between blocks."""


def missing_tensor(name: str, names: frozenset[str]) -> WeightError:
    """The error for a tensor that is not in the checkpoint; its message lists the most similar names."""
    near = ", ".join(get_close_matches(name, names, n=3)) or "none"
    return WeightError(f"{name}: not in the checkpoint (nearest names: {near}); the files belong to another model")


class NoWeights:
    """See `Checkpoint`: the files of a model of which only the configuration is at hand."""

    def names(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `WeightError`."""
        raise WeightError(f"{name}: the model's weights have not been opened; leave out --executor dry")

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """Raises `WeightError`."""
        self.shape(name)


class RandomWeights(NoWeights):
    """See `Checkpoint`: small random numbers in place of weights, the same for the same slice of a tensor."""

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with uniform numbers, as small as vLLM's."""
        seed = crc32(f"{name} {[(part.start, part.stop) for part in index]}".encode())
        out.copy_(torch.empty(out.shape).uniform_(-_SMALL, _SMALL, generator=torch.Generator().manual_seed(seed)))
