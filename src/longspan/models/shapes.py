"""The parameters of a model, or of a part of one, found by building it on a loader that loads nothing.

It owns this loader; it must not know what the parameters are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.models.context import LayerContext, Linear, LinearStack
from longspan.models.params import Extent, Param, loaded_shape


def _whole(axis: str, size: int) -> tuple[int, int]:
    """The `Extent` of a model that is not sharded."""
    return 0, size


class ShapeLoader:
    """A loader that records every request, and returns tensors on PyTorch's meta device, which have no memory."""

    device = torch.device("meta")

    def __init__(self, extent: Extent = _whole) -> None:
        self.extent = extent
        self.requests: list[tuple[Param, ...]] = []  # the parameters of each call, in order

    @property
    def params(self) -> list[Param]:
        """Every parameter that was requested, as often as it was requested."""
        return [param for request in self.requests for param in request]

    @property
    def matrices(self) -> list[tuple[Param, ...]]:
        """The requests for matrices, one entry for each product of the model."""
        return [request for request in self.requests if request[0].is_matrix]

    def load(self, *params: Param) -> Tensor:
        """See `Loader.load`."""
        self.requests.append(params)
        shapes = [loaded_shape(param.bounds(self.extent), param.stacked is not None) for param in params]
        return torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], device=self.device)

    def table(self, param: Param, is_multiplied: bool) -> Tensor:
        """See `Loader.table`."""
        return self.load(param)

    def linear(self, *params: Param) -> Linear:
        """See `Loader.linear`."""
        self.requests.append(params)
        return _no_product

    def linear_stack(self, *entries: Sequence[Param]) -> LinearStack:
        """See `Loader.linear_stack`. Each weight is a request."""
        return LinearStack(tuple(self.linear(*entry) for entry in entries))


def requests_of(build: Callable[[LayerContext], object], extent: Extent = _whole) -> ShapeLoader:
    """The loader on which `build` was called, with every request. `extent` gives the part of each axis that is held."""
    loader = ShapeLoader(extent)
    build(LayerContext(loader))
    return loader


def _no_product(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The `Linear` of a `ShapeLoader`: raises `TypeError`."""
    raise TypeError("a model built for its shapes has no weights to multiply by")
