"""The configuration of an engine, checked before anything is allocated.

It owns the fields, their defaults and the checks that need no model; it must not import torch or know how an option is
implemented.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Unpack

from longspan.config.checks import parse_bytes, parse_integers, require, require_choice
from longspan.config.cost import CostConstants, read_constants
from longspan.config.option import OPTION, Option, build, check_keywords, option
from longspan.config.products import ProductChoice
from longspan.config.speculation import Speculation
from longspan.config.transfer import TransferConfig

if TYPE_CHECKING:
    from longspan.config.keywords import EngineOptions

DEFAULT_LOCAL_CONTEXT = 512
DEFAULT_STEP_TOKENS, DEFAULT_RUNNING = 2048, 256
FIXED_ROWS, GPU_FIXED_ROWS = 8, 128  # an H100 reads bf16 weights in the time of some 300 rows' products
GPU_STEP_TOKENS = 8192  # of each PCP rank: fewer leave a GPU waiting for its host
EXECUTOR_NAMES = ("auto", "threads", "processes", "ray", "external", "dry")
_SEVERAL_MACHINES = ("ray", "external")
LOAD_FORMAT_NAMES = ("auto", "dummy")
SCHEDULING_POLICY_NAMES = ("fcfs", "priority")
DEVICE_NAMES = ("auto", "cpu", "cuda")
QUANTIZATION_NAMES = ("auto", "fp8", "fp16", "int8", "auto-fast", "none")
KV_DTYPE_NAMES = ("auto", "int8", "fp8", "fp8_e4m3")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
CPU_KERNEL_NAMES = ("auto", "compiled", "plain")

_SIZES = {
    "tp": "tensor_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "dcp": "decode_context_parallel_size",
    "pp": "pipeline_parallel_size",
}  # short names in the text of a layout


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the rank grid. The number of ranks is pp · pcp · tp; dcp uses ranks of the TP group."""

    tensor_parallel_size: int = option(1, "ranks over which heads and weights are split", short="-tp")
    prefill_context_parallel_size: int = option(1, "ranks over which the tokens of a prompt are split", short="-pcp")
    decode_context_parallel_size: int = option(
        1, "ranks of a TP group over which the context is split; must divide tp", short="-dcp"
    )
    pipeline_parallel_size: int = option(1, "stages over which the layers are split", short="-pp")
    _: KW_ONLY
    enable_expert_parallel: bool = option(False, "split a mixture's experts over tp x pcp ranks, not tp alone")
    disable_custom_all_reduce: bool = option(False, "sum over GPUs by NCCL alone, not through symmetric memory")
    ranks_per_node: int | None = option(None, "ranks per machine, for tree_q; default: all ranks")
    node_of_rank: tuple[int, ...] = ()  # machine of every rank, set by the executor; (): as ranks_per_node says

    @staticmethod
    def parse(field: str, text: str) -> ParallelConfig:
        """The layout in a text as `tp=8,dcp=8`; sizes left out are 1. Raises `ConfigError`, which names `field`."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            short, _, size = part.strip().partition("=")
            known = short in _SIZES and size.isdecimal()
            require(known, field, text, f"{part.strip()!r} is not a size", "write it as tp=8,pcp=1,dcp=8,pp=1")
            sizes[_SIZES[short]] = int(size)
        return ParallelConfig(**sizes)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """All sizes, in the form that `parse` reads: `tp=8,pcp=1,dcp=2,pp=1`."""
        return ",".join(f"{short}={getattr(self, name)}" for short, name in _SIZES.items())

    @property
    def short_name(self) -> str:
        """The sizes greater than 1, for people: `tp8 dcp2`."""
        sizes = {short: getattr(self, name) for short, name in _SIZES.items()}
        return " ".join(f"{short}{size}" for short, size in sizes.items() if size > 1) or "tp1"

    @property
    def flags(self) -> str:
        """The flags of the sizes greater than 1: `-tp 8 -dcp 2`."""
        sizes = {short: getattr(self, name) for short, name in _SIZES.items()}
        return " ".join(f"-{short} {size}" for short, size in sizes.items() if size > 1) or "-tp 1"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel_size * self.prefill_context_parallel_size * self.pipeline_parallel_size

    def __post_init__(self) -> None:
        for name in ("tensor", "prefill_context", "decode_context", "pipeline"):
            size = getattr(self, f"{name}_parallel_size")
            require(size >= 1, f"{name}_parallel_size", size, "must be at least 1", "use 1 for no sharding")
        if self.ranks_per_node is not None:
            require(
                self.ranks_per_node >= 1, "ranks_per_node", self.ranks_per_node, "must be at least 1", "leave it out"
            )
        tp, dcp = self.tensor_parallel_size, self.decode_context_parallel_size
        divisors = [str(n) for n in range(1, tp + 1) if tp % n == 0]
        require(
            tp % dcp == 0,
            "decode_context_parallel_size",
            dcp,
            f"must divide tensor_parallel_size={tp}, whose ranks it uses",
            f"use one of {', '.join(divisors)}, or change tensor_parallel_size",
        )


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """Where evicted pages of the prefix cache are kept. Sizes are sums over all ranks."""

    memory_bytes: int | None = option(
        None, "host memory over all ranks for pages evicted from the KV cache, as in 8G",
        name="kv_offload_memory", metavar="SIZE", parse=parse_bytes,
    )  # fmt: skip
    disk: str | None = option(
        None, "folder for pages evicted from host memory; the flag also takes PATH:SIZE; "
        "default size: half of the free space",
        name="kv_offload_disk", metavar="PATH[:SIZE]",
    )  # fmt: skip
    disk_bytes: int | None = option(
        None, "bytes in kv_offload_disk over all ranks; default: half of the free space",
        name="kv_offload_disk_bytes", flag=None,
    )  # fmt: skip
    memory_file: str | None = None  # file of the memory tier, opened by the driver
    disk_file: str | None = None  # file of the disk tier, opened by the driver

    @property
    def is_on(self) -> bool:
        """Whether pages are offloaded."""
        return self.memory_bytes is not None or self.disk is not None


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache: number, size and data type of its pages, and offload."""

    page_size: int = option(16, "tokens per KV page")
    memory_bytes: int | None = option(
        None, "KV cache per rank in bytes; k, M, G are powers of 1024; default: 1G, or on a GPU what is left",
        name="kv_cache_memory_bytes", parse=parse_bytes,
    )  # fmt: skip
    gpu_memory_utilization: float = option(
        0.9, "fraction of each GPU's free memory for weights, workspace and KV cache together"
    )
    pages_per_shard: tuple[int, ...] | None = option(
        None, "KV pages of each shard, as in 100,80, instead of kv_cache_memory_bytes", parse=parse_integers
    )
    enable_prefix_caching: bool = option(True, "share KV pages of equal prefixes")
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    dtype: str = option(
        "auto", "auto (the model's), int8 or fp8_e4m3, with a scale per token and head", name="kv_cache_dtype"
    )
    memory_settled: bool = False  # whether memory_bytes has been checked: other processes do not check it again
    memory_measured: bool = False  # whether memory_bytes is an estimate, which ranks replace by what they measure

    def __post_init__(self) -> None:
        require(
            self.enable_prefix_caching or not self.offload.is_on, "enable_prefix_caching", False,
            "offload needs the prefix cache", "leave out --no-enable-prefix-caching or --kv-offload-*",
        )  # fmt: skip
        require(
            0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", self.gpu_memory_utilization,
            "must be in (0, 1]", "0.9 is the default",
        )  # fmt: skip
        require_choice("kv_cache_dtype", self.dtype, KV_DTYPE_NAMES)
        require(self.page_size >= 1, "page_size", self.page_size, "must be at least 1", "16 is the default")
        require((self.memory_bytes or 1) > 0, "memory_bytes", self.memory_bytes, "must be positive", "give bytes")
        for pages in self.pages_per_shard or (1,):
            require(pages >= 1, "pages_per_shard", pages, "must be at least 1", "give every shard a page")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How requests are batched. `step_tokens` and `running_limit` are the effective limits."""

    max_num_batched_tokens: int | None = option(
        None,
        "new tokens per step over all ranks; default: 2048 on a CPU, 8192 for each PCP rank on GPUs, or "
        "max_num_seqs if that is more",
    )
    max_num_seqs: int | None = option(
        None, "maximum requests that run at once; default: 256, or the tokens of a step if fewer"
    )
    max_model_len: int | None = option(None, "tokens of prompt and completion; default: the model's own limit")
    local_context: int | None = option(
        None, "contexts of up to this many tokens stay on one shard; default: 512, or what a shard holds if less"
    )
    schedule: str = option("auto", "attention schedule, that is, what ranks exchange")
    speculative: Speculation | None = option(
        None, "speculative decoding: prompt-lookup:K drafts up to K tokens (1 to 64) from the request's own text, "
        "mtp:K (1 to 8) with the model's module for multi-token prediction, draft:K:MODEL (1 to 8) with a small model "
        "of the same vocabulary, eagle3:K:PATH (1 to 8) with an EAGLE-3 checkpoint",
        parse=Speculation.parse,
    )  # fmt: skip
    async_scheduling: bool | None = option(None, "plan a step while the one before it runs; default: on GPUs")
    scheduling_policy: str = option(
        "fcfs", "fcfs (first come, first served) or priority (requests with a lower `priority` first)"
    )
    fixed_rows: int = FIXED_ROWS  # rows that take as long as what a step does for any rows, as reading the weights

    def __post_init__(self) -> None:
        require_choice("scheduling_policy", self.scheduling_policy, SCHEDULING_POLICY_NAMES)
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None:
                require(value >= 1, name, value, "must be at least 1", "give a positive number")
        if self.max_model_len is not None:
            require(
                self.max_model_len >= 1,
                "max_model_len",
                self.max_model_len,
                "must be at least 1",
                "give a positive number of tokens, or leave it out to use the model's own limit",
            )
        if self.local_context is not None:
            require(
                self.local_context >= 0, "local_context", self.local_context, "must not be negative",
                "use 0 to spread every context",
            )  # fmt: skip
        require(
            self.running_limit <= self.step_tokens,
            "max_num_seqs",
            self.running_limit,
            f"exceeds max_num_batched_tokens={self.step_tokens}, so a full batch could not decode",
            "lower max_num_seqs, raise max_num_batched_tokens, or leave one of them out",
        )

    @property
    def step_tokens(self) -> int:
        """Maximum new tokens of a step: the given number, or 2048, or max_num_seqs if that is more.

        On GPUs `on_gpus` gives a number.
        """
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(DEFAULT_STEP_TOKENS, self.max_num_seqs or 0)

    @property
    def running_limit(self) -> int:
        """Maximum requests that run at once: the given number, or 256, or the tokens of a step if fewer."""
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return min(DEFAULT_RUNNING, self.step_tokens)

    def on_gpus(self, pcp: int) -> SchedulerConfig:
        """A copy for `pcp` ranks that share the tokens of a step on GPUs. A given number of tokens is kept."""
        tokens = self.max_num_batched_tokens or max(GPU_STEP_TOKENS * pcp, self.max_num_seqs or 0)
        return replace(self, max_num_batched_tokens=tokens, fixed_rows=GPU_FIXED_ROWS)

    def on_shards(self, tokens: int) -> SchedulerConfig:
        """A copy with `local_context` set, for shards of which the largest holds `tokens`. Raises `ConfigError`."""
        asked = self.local_context
        if asked is not None:
            require(
                asked <= tokens, "local_context", asked, f"exceeds the {tokens} tokens the largest shard holds",
                f"use at most {tokens}, or give the KV cache more memory",
            )  # fmt: skip
        return replace(self, local_context=min(DEFAULT_LOCAL_CONTEXT, tokens) if asked is None else asked)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How ranks on other machines are started and found."""

    ray_address: str | None = option(None, "Ray cluster to join, HOST:PORT; default: start one on this machine")
    listen: str = option("tcp://127.0.0.1:7850", "address where ranks started by torchrun connect (executor external)")
    timeout: float = option(120.0, "seconds to wait for machines and ranks of a cluster", name="cluster_timeout")

    def __post_init__(self) -> None:
        require(self.timeout > 0, "cluster_timeout", self.timeout, "must be positive", "give seconds")


@dataclass(frozen=True, kw_only=True)
class LivenessConfig:
    """After which silence a process counts as dead. All fields are seconds."""

    step_timeout: float | None = option(
        None,
        "seconds a step may take, except the first 8 after a start, which compile; "
        "default: the larger of 60 and 20 times the time expected from recent steps",
    )
    step_floor: float = 60.0  # minimum of the default limit of a step
    heartbeat_interval: float = 1.0  # between two heartbeats of a core or a rank
    heartbeat_late: float = 3.0  # silence after which `/health` answers 503
    heartbeat_timeout: float = 10.0  # silence after which a core or rank that was ready counts as dead
    start_timeout: float = 300.0  # the same before a core is ready, when C code may hold the interpreter for long
    # time of a token, measured by the engine that this one replaces because a step hung; None: measure it
    pace: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value is None or value > 0, name, value, "must be positive", "give seconds, or leave it out")


@dataclass(frozen=True)
class EngineConfig:
    """All that an engine and its workers need to start. Plain data, which is sent to processes."""

    model: str = field(metadata={OPTION: Option("Hugging Face folder or hub id, .gguf file, or smollm2")})
    _: KW_ONLY
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    # `setup.resolve` replaces auto
    executor: str = option(
        "auto", "auto (processes on GPUs, else threads), threads, processes, ray, external, "
        "or dry (no ranks; tokens are meaningless)",
    )  # fmt: skip
    cluster: ClusterConfig = field(
        default_factory=ClusterConfig,
        metadata={OPTION: Option("a ClusterConfig: how ranks on other machines are started", flag=None)},
    )
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    tokenizer: str | None = option(None, "folder or hub id of another tokenizer; default: the model's own")
    revision: str | None = option(None, "branch, tag or commit of a hub model; default: main")
    load_format: str = option(
        "auto", "auto, or dummy: random weights for config.json's sizes, to measure speed without a download"
    )
    dtype: str = option(
        "auto", "auto (bfloat16 on GPUs and on CPUs with AMX, else float32), float32, bfloat16 or float16"
    )
    device: str = option("auto", "auto (a GPU if there is one), cpu or cuda")
    attention_backend: str = option("auto", "attention kernels")
    cpu_kernels: str = option(
        "auto", "what computes in float32 on a CPU: auto (kernels compiled at start if there is a compiler, products "
        "with them only if they are measured to be faster), compiled, or plain (PyTorch's operations)",
    )  # fmt: skip
    quantization: str = option(
        "auto", "a checkpoint's FP8 weights: auto (kept as FP8 if the GPU multiplies FP8), fp8 (kept), "
        "none (dequantised at load); any weights on a CPU: fp16 (perplexity as in fp32), int8 (9 % more with SmolLM2), "
        "auto-fast (whichever is measured to be fastest)",
        short="-q",
    )  # fmt: skip
    enforce_eager: bool = option(
        False, "never record decode steps, neither as CUDA graphs nor as calls of a CPU's kernels"
    )
    cudagraph_capture_sizes: tuple[int, ...] | None = option(
        None, "numbers of requests of decode steps that are recorded as CUDA graphs, as in 1,2,4,8; a step takes the "
        "next larger one, on a CPU the largest; default: up to max_num_seqs", parse=parse_integers,
    )  # fmt: skip
    seed: int = option(0, "random seed of requests without one")
    num_threads: int | None = option(None, "CPU threads per rank; default: an even share")
    debug: bool = option(False, "compare the plan between ranks at every step")
    cost: CostConstants | None = option(
        None, "constants of the cost model (the flag takes a JSON file); default: measured at start",
        flag="cost_constants", parse=read_constants,
    )  # fmt: skip
    # decided by the driver: ranks in other processes, and engines that are started again, compute products as it does
    products: ProductChoice | None = None
    trace: bool = False  # whether ranks record when they compute and transfer
    # whether ranks read the vocabulary for grammars when they start, not with the first grammar
    read_vocabulary_ahead: bool = False
    transfer: TransferConfig | None = None  # for a prefill or decode instance; None: an instance that does both

    @classmethod
    def of(cls, model: str, **options: Unpack[EngineOptions]) -> EngineConfig:
        """A configuration from options by name, those of nested records included. Raises `ConfigError`."""
        given = {"model": model, **options}
        check_keywords(cls, given)
        return build(cls, given)

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPE_NAMES)
        require_choice("load_format", self.load_format, LOAD_FORMAT_NAMES)
        require_choice("device", self.device, DEVICE_NAMES)
        require_choice("quantization", self.quantization, QUANTIZATION_NAMES)
        require_choice("cpu_kernels", self.cpu_kernels, CPU_KERNEL_NAMES)
        require(
            not self.cache.offload.is_on or self.executor not in _SEVERAL_MACHINES,
            "executor", self.executor, "may have ranks on other machines, which cannot reach offloaded pages",
            "use processes, or leave out --kv-offload-memory and --kv-offload-disk",
        )  # fmt: skip
        require_choice("executor", self.executor, EXECUTOR_NAMES)
        sizes = self.cudagraph_capture_sizes
        require(
            sizes is None or (len(sizes) > 0 and min(sizes) >= 1), "cudagraph_capture_sizes", sizes,
            "must be numbers of at least 1", "use --enforce-eager to record nothing",
        )  # fmt: skip
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "must be in 0..2^63-1", "0 is the default")
        if self.num_threads is not None:
            require(
                self.num_threads >= 1,
                "num_threads",
                self.num_threads,
                "must be at least 1",
                "leave it out to share the machine's cores among the ranks",
            )
        dcp = self.parallel.decode_context_parallel_size
        require(
            self.scheduler.schedule != "local" or dcp == 1,
            "schedule",
            "local",
            f"with decode_context_parallel_size={dcp} queries and pages are on different ranks, so one must travel",
            "use --schedule auto, or decode_context_parallel_size=1",
        )
