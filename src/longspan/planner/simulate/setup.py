"""From a deployment to an engine of a simulation, checked before any request is played.

It owns what follows from a deployment: pages, limits and batching; it must not read options nor requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longspan.config import SchedulerConfig
from longspan.planner.deployment import Deployment
from longspan.planner.simulate.instance import InstanceConfig
from longspan.planner.simulate.trace_requests import TraceRequest
from longspan.planner.step import StepModel
from longspan.scheduler.limits import Limits


def instance_config(
    deployment: Deployment, scheduler: SchedulerConfig, cache_bytes: int | None, enable_prefix_caching: bool
) -> InstanceConfig:
    """An engine of the deployment, with the memory it leaves for pages or `cache_bytes` a rank.

    Raises `ConfigError` where not a page fits.
    """
    size, grid = deployment.page_size, deployment.grid
    deployment.check_fits(size * grid.num_shards if cache_bytes is None else 0)
    pages = deployment.pages_per_shard
    if cache_bytes is not None:
        pages = (max(1, deployment.layout.pages_in(cache_bytes, size)),) * grid.num_shards
    model = StepModel(deployment)
    return InstanceConfig(
        grid=grid,
        scheduler=scheduler.on_shards(max(pages) * size),
        page_size=size,
        pages_per_shard=pages,
        timer=model,
        chooser=replace(model.chooser, forced=scheduler.schedule),
        windows=deployment.model.layer_groups,
        enable_prefix_caching=enable_prefix_caching,
    )


def limits_of(config: InstanceConfig, max_model_len: int | None, requests: Sequence[TraceRequest]) -> Limits:
    """What one request may ask for; without a limit of its own the longest request has the model's place."""
    longest = max(request.prompt_tokens + request.max_tokens for request in requests)
    return Limits.of(max_model_len or longest, config.scheduler.schedule, config.pages_per_shard, config.page_size)
