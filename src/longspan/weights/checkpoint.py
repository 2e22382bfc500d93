"""What the engine needs of a model's files, whatever their format.

It owns the interface; it must not know formats, architectures or ranks.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Protocol

from torch import Tensor

from longspan.errors import WeightError


class Checkpoint(Protocol):
    """Named tensors on disk. Names are those of the Hugging Face hub."""

    def names(self) -> frozenset[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's whole shape; raises `WeightError` if there is none of this name."""

    def read(self, name: str, index: tuple[slice, ...], out: Tensor) -> None:
        """Copy `tensor[index]` into `out`, which has that slice's shape, converting to its dtype.

        One slice a dimension, with start and stop. Reads no more of the file than the slice, where the
        format permits, and holds no more than a block of it besides `out`.
        """


def missing_tensor(name: str, names: frozenset[str]) -> WeightError:
    """The error for a name that is not there, with the names nearest to it."""
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
