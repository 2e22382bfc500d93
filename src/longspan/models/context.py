"""What a model is given from outside: attention, the TP group, and a loader of its weights.

It owns these three interfaces; models know ranks through nothing else, and not even through them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from longspan.attention.expansion import Expansion
from longspan.models.layers import Linear
from longspan.models.params import Param


class TensorParallel(Protocol):
    """The group over which heads, feed-forward width and vocabulary are split."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the group. The input is given away: it must not be written to afterwards."""
        ...

    def all_gather_last(self, x: Tensor) -> Tensor:
        """The members' tensors concatenated along the last dimension, which may be uneven."""
        ...


class Attend(Protocol):
    """Attention of one step."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, expansion: Expansion | None = None) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] of this step's own rows, after rope → [T, Hq, D].

        With an expansion k and v are latents, and the result is [T, Hq, its value_dim].
        """
        ...


class Loader(Protocol):
    """Weights by parameter: what is returned is the part this model instance is to hold."""

    def load(self, *params: Param) -> Tensor:
        """The parameter; several are concatenated along dim 0."""
        ...

    def linear(self, *params: Param) -> Linear:
        """The parameter, or several concatenated along their rows, for products only."""
        ...

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of the part of a logical axis of whole size `size`."""
        ...
