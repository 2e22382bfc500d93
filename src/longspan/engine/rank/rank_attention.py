"""The attention of a rank: the rows that it caches, its backend and its context group, and what it costs.

It owns this part of a rank's assembly; it must not know whether ranks are threads or processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from longspan.attention.attend import Attention
from longspan.attention.backends.base import BackendShape
from longspan.attention.backends.choice import Choice
from longspan.attention.calibrate import Calibration
from longspan.attention.pool import KVPool
from longspan.attention.schedules import ContextGroup
from longspan.attention.variants import AttentionOps, Heads
from longspan.attention.workload import AttentionShape
from longspan.cache.layout import KVLayout
from longspan.config import CostConstants
from longspan.engine.capacity import WORKSPACE_TOKENS
from longspan.engine.setup import EngineSetup
from longspan.models.config import ModelConfig
from longspan.parallel.collectives import Collectives
from longspan.parallel.sharding import Sharding
from longspan.plan.reach import Place


class CachedLayers(Protocol):
    """Layers whose keys and values are cached: those of the model, or of a checkpoint of its own that drafts."""

    @property
    def model(self) -> ModelConfig:
        """Their sizes."""

    @property
    def layout(self) -> KVLayout:
        """The cache's rows."""

    @property
    def backend(self) -> Choice:
        """The attention backend."""

    @property
    def backend_shape(self) -> BackendShape:
        """What it must support."""

    @property
    def attention_shape(self) -> AttentionShape:
        """Sizes on one rank."""


def measure_cost(setup: EngineSetup, rank: int, group: Collectives, device: torch.device) -> CostConstants:
    """Measure the constants of the cost model. All ranks of a context group must do so at the same time."""
    grid, model = setup.grid, setup.model
    place = Place(grid.ranks[rank].pcp, grid.ranks[rank].shard, grid.shards_of_pcp)
    ops = _ops(setup, Sharding(grid, rank, model.num_q_heads, model.num_kv_heads), device)
    context = context_group(setup, rank, group)
    return Calibration(ops, context, place, setup.attention_shape, setup.schedules, setup.dtype, device).measure()


def context_group(setup: EngineSetup, rank: int, group: Collectives) -> ContextGroup:
    """The context group of a rank, as schedules know it."""
    nodes = setup.grid.nodes(setup.grid.context_group(rank))
    return ContextGroup(group, setup.grid.shards_of_pcp, nodes, WORKSPACE_TOKENS)


def _ops(cached: CachedLayers, sharding: Sharding, device: torch.device) -> AttentionOps:
    model = cached.model
    return AttentionOps(
        cached.backend.record.build(device, cached.backend_shape),
        Heads.of(sharding),
        model.attention_scale,
        model.cached_value_dim,
        cached.attention_shape.expansion,
    )


def build_attention(
    setup: EngineSetup, cached: CachedLayers, sharding: Sharding, layers: Iterable[int], context: ContextGroup,
    device: torch.device,
) -> Attention:  # fmt: skip
    """Attention in the layers of the model, or in those of a checkpoint that drafts, with their rows of the cache."""
    start, stop = sharding.kv_extent
    pool = KVPool(
        cached.layout.with_kv_heads(stop - start),
        layers,
        setup.pages_per_shard[sharding.grid.ranks[sharding.rank].shard],
        setup.config.cache.page_size,
        setup.cache_dtype,
        device,
    )
    attention = Attention(pool, _ops(cached, sharding, device), context, setup.model.layer_groups, setup.schedules)
    if setup.maps_pools:
        attention.map_peers()
    return attention
