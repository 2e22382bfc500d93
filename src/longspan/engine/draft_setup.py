"""A checkpoint of its own that drafts tokens: its files, its sizes, and its rows in the cache.

It owns what is decided about it before a rank starts; how tokens are drafted is `rank/drafting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.backends.base import BackendShape
from longspan.attention.backends.choice import Choice
from longspan.attention.workload import AttentionShape
from longspan.cache.layout import KVLayout
from longspan.engine.capacity import DraftBytes
from longspan.models.config import ModelConfig
from longspan.models.context import DraftModule, LayerContext
from longspan.models.shapes import requests_of
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.weights.source import ModelSource

Embed = Callable[[Tensor], Tensor]
"""int64 token ids [T] → hidden states [T, hidden]."""
BuildDrafts = Callable[[LayerContext, torch.dtype, Embed | None], DraftModule]
"""(what layers are built from, dtype, the embedding of the model that it drafts for) → what drafts."""


@dataclass(frozen=True)
class DraftCheckpoint:
    """A checkpoint of its own that drafts."""

    # its files
    source: ModelSource
    # its sizes; its vocabulary is that of its output head
    model: ModelConfig
    # builds it on a rank
    build: BuildDrafts
    # layers of the model that it drafts for whose inputs it takes
    observed_layers: tuple[int, ...] = ()

    def sharding(self, grid: Grid, rank: int) -> Sharding:
        """A rank's part of it. It has no stages: the last stage of the model holds all its layers."""
        return Sharding(grid.one_stage, grid.rank_in_stage(rank), self.model.num_q_heads, self.model.num_kv_heads)

    def weight_bytes(self, grid: Grid, element_bytes: float) -> float:
        """Bytes of its weights on the rank that holds the most of them."""
        return max(self._elements(grid, rank) for rank in grid.tp_group(0)) * element_bytes

    def _elements(self, grid: Grid, rank: int) -> int:
        extent = self.sharding(grid, rank).extent
        asked = requests_of(lambda context: self.build(context, torch.float32, None), extent)
        bounds = [param.bounds(extent) for param in set(asked.params)]
        return sum(math.prod(stop - start for start, stop in each) for each in bounds)


@dataclass(frozen=True)
class DraftSetup:
    """A checkpoint of its own that drafts, and how its keys and values are cached."""

    # the checkpoint
    checkpoint: DraftCheckpoint
    # the cache's rows in its layers, on the rank that holds the most KV heads
    layout: KVLayout
    # the attention backend, and why it was chosen
    backend: Choice
    # sizes and dtypes that the backend must support
    backend_shape: BackendShape
    # sizes on one rank that the cost of attention depends on
    attention_shape: AttentionShape

    @property
    def model(self) -> ModelConfig:
        """Its sizes."""
        return self.checkpoint.model

    def needs(self, grid: Grid, dtype: torch.dtype) -> DraftBytes:
        """The memory that it takes."""
        return DraftBytes(self.checkpoint.weight_bytes(grid, dtype.itemsize), self.layout.bytes_per_token)

    def layout_of(self, grid: Grid, rank: int) -> KVLayout:
        """The cache's rows in its layers on a rank of the last stage."""
        start, stop = self.checkpoint.sharding(grid, rank).kv_extent
        return replace(self.layout, kv_heads=stop - start)
