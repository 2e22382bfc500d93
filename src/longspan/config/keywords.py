"""The keywords of `LLM` for type checkers and editors, which cannot derive them from the fields of `EngineConfig`.

A test compares their names, order and types with the fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from longspan.config.cost import CostConstants
from longspan.config.engine import ClusterConfig


class EngineOptions(TypedDict, total=False):
    """The types of the options of an engine. An option that is parsed takes its text."""

    tensor_parallel_size: int
    prefill_context_parallel_size: int
    decode_context_parallel_size: int
    pipeline_parallel_size: int
    enable_expert_parallel: bool
    disable_custom_all_reduce: bool
    ranks_per_node: int | None
    page_size: int
    kv_cache_memory_bytes: int | None
    gpu_memory_utilization: float
    pages_per_shard: Sequence[int] | None
    enable_prefix_caching: bool
    kv_offload_memory: int | None
    kv_offload_disk: str | None
    kv_offload_disk_bytes: int | None
    kv_cache_dtype: str
    max_num_batched_tokens: int | None
    max_num_seqs: int | None
    max_model_len: int | None
    local_context: int | None
    schedule: str
    speculative: str | None
    async_scheduling: bool | None
    scheduling_policy: str
    executor: str
    cluster: ClusterConfig | None
    step_timeout: float | None
    tokenizer: str | None
    revision: str | None
    load_format: str
    dtype: str
    device: str
    attention_backend: str
    cpu_kernels: str
    quantization: str
    enforce_eager: bool
    cudagraph_capture_sizes: Sequence[int] | None
    seed: int
    num_threads: int | None
    debug: bool
    cost: CostConstants | None
