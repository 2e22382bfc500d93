"""Makes the configuration of a simulated engine from a deployment, and checks it before a simulation starts.

It owns the pages and limits that follow from a deployment; it must not read options or traces.
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
    """The configuration of an engine with `cache_bytes` of KV cache on a rank; None: what the deployment leaves.

    Raises `ConfigError` if not even one page fits.
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
    """The limits of one request. Without `max_model_len` the longest request sets the limit."""
    longest = max(request.prompt_tokens + request.max_tokens for request in requests)
    return Limits.of(max_model_len or longest, config.scheduler.schedule, config.pages_per_shard, config.page_size)
