"""The interfaces between a model and the engine: what a model is built from, what it calls, and what it provides.

It owns these interfaces. They hide all ranks: a model knows attention, two groups and a loader, and no rank's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.models.ops.base import LayerOps, Table
from longspan.models.ops.plain import PlainOps
from longspan.models.params import Param


class TensorParallel(Protocol):
    """The group over which heads, the feed-forward width and the vocabulary are split."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the group, in any one shape. The caller must not write to x afterwards."""

    def sum_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """`LayerOps.add_norm` of the sum of x [T, width] over the group, in one launch.

        None where the group has no such launch. The caller then sums by `all_reduce`, and adds and norms itself.
        """

    def all_gather_last(self, x: Tensor) -> Tensor:
        """The members' tensors concatenated along the last dimension, whose sizes may differ."""


class ExpertParallel(Protocol):
    """The ranks over which the experts of a mixture are split."""

    def apply(
        self, x: Tensor, experts: Tensor, weights: Tensor, compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """x [T, hidden], experts [T, k] int64, weights [T, k] → [T, hidden]: the weighted sum over each row's experts.

        `compute(x, experts, weights)` gives the part of this sum that comes from the experts held here.
        """


class Attend(Protocol):
    """The attention of one step, in all layers."""

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, Dq] after rope, k and v [T, Hkv, D] → [T, Hq, Dv]; rows are this rank's tokens of the step.

        In a layer with latent attention k and v are both the token's cache row, and Dq is the width before absorption.
        """


class Linear(Protocol):
    """A product with a weight, in whichever format the weight is stored."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] → x · weight [out, in]ᵀ + bias [out]."""


@runtime_checkable
class GatedLinear(Protocol):
    """A product with gate and up, of which some numbers of rows can be computed together with their SwiGLU."""

    def swiglu(self, x: Tensor) -> Tensor | None:
        """x [T, in] → `LayerOps.swiglu` of the product without a bias [T, out / 2]; None: it is an operation apart."""


@dataclass(frozen=True)
class LinearStack:
    """One product for each of several weights of the same shape, as those of a mixture's experts."""

    # the products, in the order of the weights
    linears: tuple[Linear, ...]
    # all weights in one tensor: [weights, out, in], in MXFP4 [weights, out, in / 2]; None if their format only serves
    # products one by one
    weight: Tensor | None = None
    # their scales: of FP8 fp32 [weights, out / 128, in / 128], of MXFP4 uint8 [weights, out, in / 32]
    scales: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        """`weight`. Raises `TypeError` if there is none."""
        if self.weight is None:
            raise TypeError("these weights are stored one by one")
        return self.weight


class Loader(Protocol):
    """Gives a model its parameters: of each the part that this rank holds."""

    @property
    def device(self) -> torch.device:
        """The device of all returned tensors."""
        ...

    def load(self, *params: Param) -> Tensor:
        """The parameter, or several parameters concatenated along dimension 0."""

    def table(self, param: Param, is_multiplied: bool) -> Table:
        """The parameter as a table in which `LayerOps.embed` looks rows up.

        `is_multiplied` says that `linear` is asked for it too. Both then share one copy, unless the product's format
        has no rows that can be looked up.
        """

    def linear(self, *params: Param) -> Linear:
        """The product with a parameter, or with several concatenated along dimension 0.

        It may keep the weight in a format that only serves products.
        """

    def linear_stack(self, *entries: Sequence[Param]) -> LinearStack:
        """The products with several weights, each of which is as in `linear`."""

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        """(start, stop) of the part of a logical axis of `size` items that this rank holds."""


class Alone:
    """The groups of a model on a single rank: a TP group of one, and a rank that holds all experts."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `TensorParallel.all_reduce`."""
        return x

    def sum_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """See `TensorParallel.sum_add_norm`."""
        return None

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
    """What every layer is built from."""

    # gives the parameters
    loader: Loader
    # the TP group
    tp: TensorParallel = field(default_factory=Alone)
    # the group over which experts are split
    experts: ExpertParallel = field(default_factory=Alone)
    # the operations between matrix products
    ops: LayerOps = field(default_factory=PlainOps)


class DraftModule(Protocol):
    """What predicts the token after the next one: layers behind the last one of a model, or a checkpoint of its own.

    Row p takes the token at position p + 1 and, if it uses them, hidden states of the token at position p; it predicts
    the token at position p + 2. Its attention has layers of the cache of its own, in which a row is at position p.
    """

    def first_input(self, hidden: Tensor, observed: Tensor | None) -> Tensor:
        """What the first run takes [T, width], from what `Model.layers` returned, `hidden` [T, hidden].

        `observed` [T, n · hidden] is what n layers took, side by side; None where no layer is observed.
        """

    def layers(self, next_ids: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One run, over tokens at int64 `positions` [T], each followed by the token of int64 `next_ids` [T].

        `hidden` [T, hidden] are what `first_input` returned for these tokens, or what the run before returned for the
        tokens one position earlier. Returns [T, hidden].
        """

    def head(self, hidden: Tensor) -> Tensor:
        """What `layers` returned, or rows of it, [T, hidden] → logits [T, vocab], of any float dtype."""


class Model(Protocol):
    """A decoder, or the part of one on a pipeline stage: the layers that its loader gives."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""

    @property
    def embedding(self) -> Callable[[Tensor], Tensor] | None:
        """int64 token ids [T] → hidden states [T, hidden]; None on a stage without the first layer."""

    @property
    def head(self) -> Callable[[Tensor], Tensor] | None:
        """What `layers` returned, or rows of it, [T, hidden] → logits [T, vocab], of any float dtype.

        None before the last stage.
        """

    @property
    def draft_module(self) -> DraftModule | None:
        """The module that drafts tokens; None before the last stage, and where the engine does not draft with it."""

    def layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Apply the layers of this stage: x [T, hidden], of tokens at int64 `positions` [T] → [T, hidden]."""
