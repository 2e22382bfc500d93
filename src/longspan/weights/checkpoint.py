"""The interface through which weights are read, whatever the format of the files.

It owns the interface; it must not know formats, architectures or ranks.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Protocol

from torch import Tensor

from longspan.errors import WeightError


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


def missing_tensor(name: str, names: frozenset[str]) -> WeightError:
    """The error for a tensor that is not in the checkpoint; its message lists the most similar names."""
    near = ", ".join(get_close_matches(name, names, n=3)) or "none"
    return WeightError(f"{name}: not in the checkpoint (nearest names: {near}); the files belong to another model")
