"""What is asked of an engine that is one side of a pair.

It owns this interface, which an engine's setup has: so that pages can move without knowing engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from longspan.cache.layout import KVLayout
from longspan.config import EngineConfig
from longspan.parallel.grid import Grid

if TYPE_CHECKING:
    from longspan.models.config import ModelConfig
    from longspan.scheduler.limits import Limits
    from longspan.weights.source import ModelSource


class InstanceSetup(Protocol):
    """An engine's configuration, resolved for its model."""

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
        """Of a cache row."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""

    @property
    def limits(self) -> Limits:
        """What one request may ask for."""

    def device(self, number: int = 0) -> torch.device:
        """The device of that number on a machine."""
