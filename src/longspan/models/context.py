"""What a model is given from outside: attention, the TP group, and a loader of its weights.

It owns these three interfaces; models know ranks through nothing else, and not even through them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from longspan.attention.layer import AttentionLayer
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

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, Dq], k and v [T, Hkv, D] of this step's own rows, after rope → [T, Hq, value dim].

        In a latent layer k and v are its cache rows, as wide as `layer.latent.absorb` makes queries.
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
