"""Which parameters a model, or a part of one, has: it is built on a loader that makes no tensors and says what it saw.

It owns that loader; it must not know what the parameters are for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longspan.models.context import LayerContext, Linear
from longspan.models.params import Extent, Param, loaded_shape


def _whole(axis: str, size: int) -> tuple[int, int]:
    return 0, size


class ShapeLoader:
    """A loader that remembers what it was asked for, and gives tensors that have a shape and no memory."""

    device = torch.device("meta")

    def __init__(self, extent: Extent = _whole) -> None:
        self.extent = extent
        self.requests: list[tuple[Param, ...]] = []  # what was asked for at once, in order

    @property
    def params(self) -> list[Param]:
        """Every parameter that was asked for; one that is used twice is there twice."""
        return [param for request in self.requests for param in request]

    @property
    def matrices(self) -> list[tuple[Param, ...]]:
        """What was asked for to be multiplied by, one entry for each product."""
        return [request for request in self.requests if request[0].is_matrix]

    def load(self, *params: Param) -> Tensor:
        """See `Loader.load`."""
        self.requests.append(params)
        shapes = [loaded_shape(param.bounds(self.extent), param.stacked is not None) for param in params]
        return torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], device=self.device)

    def linear(self, *params: Param) -> Linear:
        """See `Loader.linear`."""
        self.requests.append(params)
        return _no_product


def asked_by(build: Callable[[LayerContext], object], extent: Extent = _whole) -> ShapeLoader:
    """The loader of what `build` makes, with all that it was asked for; of every axis the part that `extent` gives."""
    loader = ShapeLoader(extent)
    build(LayerContext(loader))
    return loader


def _no_product(x: Tensor, bias: Tensor | None = None) -> Tensor:
    raise TypeError("a model built for its shapes has no weights to multiply by")
