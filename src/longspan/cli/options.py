"""The engine's options on the command line, under vLLM's names, and their way into an `EngineConfig`.

It owns names, short forms and help texts; ranges and combinations are checked by the configuration itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from longspan.attention.backends import BACKEND_NAMES
from longspan.attention.schedules import SCHEDULE_NAMES
from longspan.config import (
    CacheConfig,
    ClusterConfig,
    CostConstants,
    EngineConfig,
    LivenessConfig,
    OffloadConfig,
    ParallelConfig,
    SchedulerConfig,
    drafted_tokens,
)
from longspan.errors import ConfigError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hugging Face folder or hub id, .gguf file, or smollm2", show_default=False),
]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel-size", "-tp", help="ranks the heads are split over")]
PrefillContextParallel = Annotated[
    int, typer.Option("--prefill-context-parallel-size", "-pcp", help="ranks a prompt's tokens are split over")
]
DecodeContextParallel = Annotated[
    int,
    typer.Option(
        "--decode-context-parallel-size", "-dcp", help="ranks of a TP group that split the context; divides tp"
    ),
]
PipelineParallel = Annotated[
    int, typer.Option("--pipeline-parallel-size", "-pp", help="stages the layers are split over")
]
ExpertParallel = Annotated[
    bool, typer.Option("--enable-expert-parallel", help="split a mixture's experts over tp x pcp ranks, not tp alone")
]
RanksPerNode = Annotated[
    int | None, typer.Option("--ranks-per-node", help="ranks that share a machine, for tree_q; default: all")
]
PageSize = Annotated[int, typer.Option("--page-size", help="tokens in a KV page")]
CacheMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-memory-bytes",
        help="KV cache of a rank in bytes; k, M, G are 1024-based; default: 1G, or what is left of a GPU",
    ),
]
Utilization = Annotated[
    float, typer.Option("--gpu-memory-utilization", help="part of a GPU's free memory that is used in all")
]
AttentionBackend = Annotated[str, typer.Option("--attention-backend", help=", ".join(BACKEND_NAMES))]
PagesPerShard = Annotated[
    str | None, typer.Option("--pages-per-shard", help="pages of each shard, as in 100,80, instead of the memory")
]
PrefixCaching = Annotated[
    bool, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="share pages of equal prefixes")
]
OffloadMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-offload-memory",
        metavar="SIZE",
        help="host memory, for all ranks, for pages the KV cache gives up, as in 8G",
    ),
]
OffloadDisk = Annotated[
    str | None,
    typer.Option(
        "--kv-offload-disk",
        metavar="PATH[:SIZE]",
        help="folder for pages that memory gives up, or folder:size; default: half of what is free there",
    ),
]
BatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        help="new tokens a step computes over all ranks; default: 2048, or --max-num-seqs if that is more",
    ),
]
NumSeqs = Annotated[
    int | None,
    typer.Option("--max-num-seqs", help="requests that run at once; default: 256, or as many as a step has tokens"),
]
ModelLength = Annotated[
    int | None, typer.Option("--max-model-len", help="tokens of prompt and completion; default: the model's own limit")
]
LocalContext = Annotated[
    int | None,
    typer.Option("--local-context", help="contexts up to this many tokens stay on one rank; default: 512"),
]
Schedule = Annotated[str, typer.Option("--schedule", help=f"what travels: {', '.join(SCHEDULE_NAMES)}")]
Speculative = Annotated[
    str | None, typer.Option("--speculative", help="prompt-lookup:K drafts K tokens from the text itself")
]
RunAhead = Annotated[
    bool | None,
    typer.Option("--run-ahead/--no-run-ahead", help="plan a step while the one before it runs; default: on GPUs"),
]
ExecutorName = Annotated[
    str,
    typer.Option(
        "--executor",
        help="auto (processes for several ranks on GPUs, else threads), threads, processes, ray, external, "
        "or dry: no ranks, made-up tokens",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda")]
Quantization = Annotated[
    str,
    typer.Option(
        "--quantization",
        "-q",
        help="a checkpoint's FP8 weights: auto (kept where the GPU multiplies them), fp8 (kept), none (multiplied out)",
    ),
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="never record decode steps as CUDA graphs")]
CacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="auto (the model's), int8 or fp8_e4m3: a scale a token and head")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="Ray cluster to join, HOST:PORT; default: start one here")
]
Listen = Annotated[
    str, typer.Option("--listen", help="where ranks report that you start with torchrun (--executor external)")
]
ClusterTimeout = Annotated[
    float, typer.Option("--cluster-timeout", help="seconds to wait for machines and ranks of a cluster")
]
StepTimeout = Annotated[
    float | None,
    typer.Option(
        "--step-timeout",
        help="seconds a step may take, but for the first 8 after a start, which compile; "
        "default: the larger of 60 and 20 times what recent steps let expect",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Seed = Annotated[int, typer.Option("--seed", help="of requests that bring none")]
Threads = Annotated[int | None, typer.Option("--num-threads", help="CPU threads a rank; default: an even share")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Constants = Annotated[
    str | None, typer.Option("--cost-constants", help="JSON file of the cost model's constants; default: measured")
]
Debug = Annotated[bool, typer.Option("--debug", help="compare the plan between ranks at every step")]


def engine_config(
    model: Model,
    tensor_parallel_size: TensorParallel = 1,
    prefill_context_parallel_size: PrefillContextParallel = 1,
    decode_context_parallel_size: DecodeContextParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    enable_expert_parallel: ExpertParallel = False,
    ranks_per_node: RanksPerNode = None,
    page_size: PageSize = 16,
    kv_cache_memory_bytes: CacheMemory = None,
    gpu_memory_utilization: Utilization = 0.9,
    pages_per_shard: PagesPerShard = None,
    enable_prefix_caching: PrefixCaching = True,
    kv_offload_memory: OffloadMemory = None,
    kv_offload_disk: OffloadDisk = None,
    max_num_batched_tokens: BatchedTokens = None,
    max_num_seqs: NumSeqs = None,
    max_model_len: ModelLength = None,
    local_context: LocalContext = None,
    schedule: Schedule = "auto",
    speculative: Speculative = None,
    run_ahead: RunAhead = None,
    executor: ExecutorName = "auto",
    ray_address: RayAddress = None,
    listen: Listen = ClusterConfig.listen,
    cluster_timeout: ClusterTimeout = ClusterConfig.timeout,
    step_timeout: StepTimeout = None,
    dtype: Dtype = "auto",
    kv_cache_dtype: CacheDtype = "auto",
    device: Device = "auto",
    attention_backend: AttentionBackend = "auto",
    quantization: Quantization = "auto",
    enforce_eager: EnforceEager = False,
    seed: Seed = 0,
    num_threads: Threads = None,
    debug: Debug = False,
    cost_constants: Constants = None,
) -> EngineConfig:
    """The options as a checked configuration. Raises `ConfigError`."""
    return EngineConfig(
        model=model, dtype=dtype, device=device, attention_backend=attention_backend, debug=debug,
        quantization=quantization, enforce_eager=enforce_eager, executor=executor, seed=seed, num_threads=num_threads,
        parallel=ParallelConfig(
            tensor_parallel_size, prefill_context_parallel_size, decode_context_parallel_size,
            pipeline_parallel_size, enable_expert_parallel, ranks_per_node,
        ),
        cache=CacheConfig(
            page_size,
            None if kv_cache_memory_bytes is None else parse_bytes("kv_cache_memory_bytes", kv_cache_memory_bytes),
            None if pages_per_shard is None else parse_integers("pages_per_shard", pages_per_shard),
            enable_prefix_caching, kv_cache_dtype, gpu_memory_utilization,
            offload_config(kv_offload_memory, kv_offload_disk),
        ),
        scheduler=SchedulerConfig(
            max_num_batched_tokens, max_num_seqs, max_model_len, local_context, schedule,
            drafted_tokens(speculative), run_ahead,
        ),
        cluster=ClusterConfig(ray_address, listen, cluster_timeout), liveness=LivenessConfig(step_timeout),
        cost=None if cost_constants is None else read_constants(cost_constants),
    )  # fmt: skip


def read_constants(path: str) -> CostConstants:
    """The cost model's constants from a JSON file, as `longspan explain --json` prints them. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=CostConstants)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            "cost_constants", path, f"cannot be read ({error})", "give what `longspan explain --json` prints there"
        ) from error


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put every engine option on a command; it is called with the configuration they make."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    engine = list(inspect.signature(engine_config, eval_str=True).parameters.values())

    def with_options(**values: Any) -> None:
        config = engine_config(**{parameter.name: values.pop(parameter.name) for parameter in engine})
        command(config, **values)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*engine, *own)]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__doc__, with_options.__name__ = command.__doc__, command.__name__
    return with_options


def offload_config(memory: str | None, disk: str | None) -> OffloadConfig:
    """The two options of KV offload. Raises `ConfigError`."""
    folder, colon, size = (disk or "").rpartition(":")
    sized = colon and re.fullmatch(r"\d.*", size)
    return OffloadConfig(
        None if memory is None else parse_bytes("kv_offload_memory", memory),
        folder if sized else disk,
        parse_bytes("kv_offload_disk", size) if sized else None,
    )


def parse_bytes(field: str, text: str) -> int:
    """`512M`, `1.5G` or a plain number of bytes. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ConfigError(field, text, "is not a size", "give bytes, or a number with k, M, G or T")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_integers(field: str, text: str) -> tuple[int, ...]:
    """A comma-separated list of integers. Raises `ConfigError`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(field, text, "is not a list of integers", "write them as 1,2,3") from None
