"""The size of the KV cache on a GPU, from its free memory; an error if the model does not fit.

It owns this check and the remedy that it names; `capacity.py` computes the sums. It must not allocate anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from longspan.config import EngineConfig, ParallelConfig
from longspan.engine.capacity import DraftBytes, RankMemory
from longspan.engine.rank.scaled_weights import ScaledChoice
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig
from longspan.models.decoder import DecoderModel
from longspan.models.registry import BuildModel
from longspan.parallel.grid import layouts
from longspan.weights.formats import WeightFormat

_FORMATS = MappingProxyType({torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"})
_GIB = 1 << 30
_MOST_NAMED = 4
_MOST_RANKS = 64


@dataclass(frozen=True)
class _Device:
    """The free memory of a GPU, as a device for `RankMemory`."""

    # bytes that are free
    memory_bytes: float


def weight_format(values: Mapping[str, Any], dtype: torch.dtype, scaled: ScaledChoice) -> WeightFormat:
    """The format in which weights are held: that of config.json (`values`) if it is kept, else `dtype`."""
    name = _FORMATS[dtype]
    return WeightFormat.of(values, name) if scaled.keeps else WeightFormat.named(name, name)


def cache_bytes(
    config: EngineConfig, model: ModelConfig, weights: WeightFormat, cache_element_bytes: int, free: int,
    build: BuildModel = DecoderModel, drafts: DraftBytes | None = None,
) -> int:  # fmt: skip
    """Bytes of the cache of a rank whose device has `free` bytes: the configured size, or all that is left.

    Raises `ConfigError` if that is too little, with the GiB that are needed and free and layouts that would fit.
    """
    utilisation = config.cache.gpu_memory_utilization
    device = _Device(free)
    here = RankMemory(
        model, device, config.parallel, weights, cache_element_bytes,
        config.cache.page_size, utilisation, max_num_batched_tokens=config.scheduler.step_tokens,
        max_num_seqs=config.scheduler.running_limit, build=build, drafts=drafts or DraftBytes(),
    )  # fmt: skip
    least = config.cache.memory_bytes or here.layout.bytes_per_token * config.cache.page_size
    if here.cache_bytes >= least:
        return config.cache.memory_bytes or int(here.cache_bytes)
    needed = here.weight_bytes + here.workspace_bytes + least
    raise ConfigError(
        "gpu_memory_utilization", utilisation,
        f"a rank needs {needed / _GIB:.1f} GiB (weights {here.weight_bytes / _GIB:.1f}, workspace and CUDA graphs "
        f"{here.workspace_bytes / _GIB:.1f}, cache {least / _GIB:.1f}); "
        f"{free / _GIB:.1f} GiB are free, {free * utilisation / _GIB:.1f} of them to be used",
        _remedy(here, least),
    )  # fmt: skip


def _remedy(here: RankMemory, least: int) -> str:
    for ranks in range(here.grid.world_size, _MOST_RANKS + 1):
        fitting = [layout for layout in layouts(ranks) if _fits(here, layout, least)]
        if fitting:
            named = ", ".join(
                f"-tp {one.tensor_parallel_size} -pcp {one.prefill_context_parallel_size} "
                f"-dcp {one.decode_context_parallel_size} -pp {one.pipeline_parallel_size}"
                for one in fitting[:_MOST_NAMED]
            )
            return f"on {ranks} such GPUs these fit: {named}"
    return (
        "lower --max-num-batched-tokens or --max-num-seqs, give the cache less, use a smaller dtype, or a GPU with "
        "more memory"
    )


def _fits(here: RankMemory, layout: ParallelConfig, least: int) -> bool:
    try:
        return replace(here, parallel=layout).cache_bytes >= least
    except ConfigError:  # the model cannot be divided in this layout
        return False
