"""The interface that disaggregation needs of an engine's setup.

It owns this interface, so that this package does not import the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from longspan.cache.layout import KVLayout
from longspan.config import EngineConfig
from longspan.parallel.grid import Grid

if TYPE_CHECKING:
    from longspan.models.config import ModelConfig
    from longspan.weights.source import ModelSource


class InstanceSetup(Protocol):
    """An engine's configuration, resolved for its model. `EngineSetup` implements it."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def source(self) -> ModelSource: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def grid(self) -> Grid: ...

    @property
    def layout(self) -> KVLayout:
        """The layout of a cache row."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""

    def device(self, number: int = 0) -> torch.device:
        """The device with this number on its host."""
