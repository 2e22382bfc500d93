"""What a model is given from outside (attention, its groups, a loader of its weights), and what it gives.

It owns these interfaces; models know ranks through nothing else, and not even through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.models.params import Param


class TensorParallel(Protocol):
    """The group over which heads, feed-forward width and vocabulary are split."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the group. The input is given away: it must not be written to afterwards."""

    def all_gather_last(self, x: Tensor) -> Tensor:
        """The members' tensors concatenated along the last dimension, which may be uneven."""


class ExpertParallel(Protocol):
    """The ranks over which the experts of a mixture are split."""

    def apply(
        self, x: Tensor, experts: Tensor, weights: Tensor, compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Weighted sums [T, hidden] of the experts [T, k] (int64) that rows x [T, hidden] chose, with weights [T, k].

        `compute` sums those of its rows' choices that are held here; all such sums of a row are added up.
        """


class Attend(Protocol):
    """Attention of one step."""

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, Dq], k and v [T, Hkv, D] of this step's own rows, after rope → [T, Hq, value dim].

        In a latent layer k and v are its cache rows, as wide as `layer.latent.absorb` makes queries.
        """


class Linear(Protocol):
    """The weight of a product, in whatever form it is kept."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → x · weight [out, in]ᵀ + bias [out]."""


class Loader(Protocol):
    """Weights by parameter: what is returned is the part this model instance is to hold, on `device`."""

    @property
    def device(self) -> torch.device: ...

    def load(self, *params: Param) -> Tensor:
        """The parameter; several are concatenated along dim 0."""

    def linear(self, *params: Param) -> Linear:
        """The parameter, or several concatenated along their rows, for products only."""

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of the part of a logical axis of whole size `size`."""


class Alone:
    """The groups of a model that has no peers: a TP group of one, and all experts held here."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `TensorParallel.all_reduce`."""
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """See `TensorParallel.all_gather_last`."""
        return x

    def apply(
        self, x: Tensor, experts: Tensor, weights: Tensor, compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """See `ExpertParallel.apply`."""
        return compute(x, experts, weights)


@dataclass(frozen=True)
class LayerContext:
    """What every layer is built from and talks to."""

    loader: Loader
    tp: TensorParallel = field(default_factory=Alone)
    experts: ExpertParallel = field(default_factory=Alone)


class Model(Protocol):
    """A decoder, or the run of its layers that its loader gives, with the ends that belong to them."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that go from one run of layers to the next."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of hidden states."""

    @property
    def embedding(self) -> Callable[[Tensor], Tensor] | None:
        """int64 token ids [T] → hidden states [T, hidden]; None where the first layer is not held."""

    @property
    def head(self) -> Callable[[Tensor], Tensor] | None:
        """[R, hidden] → fp32 logits [R, vocab]; None where the last layer is not held."""

    def layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] of tokens at int64 positions [T] through the layers held here."""
