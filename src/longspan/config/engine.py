"""Frozen, resolved configuration: what the user asked for, checked before anything is allocated.

It owns the fields, their defaults and the checks that need no model; it must not import torch
or know how any option is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from longspan.config.checks import require, require_choice
from longspan.config.cost import CostConstants
from longspan.config.transfer import TransferConfig

DEFAULT_LOCAL_CONTEXT = 512
DEFAULT_STEP_TOKENS, DEFAULT_RUNNING = 2048, 256
EXECUTOR_NAMES = ("auto", "threads", "processes", "ray", "external", "dry")
_SEVERAL_MACHINES = ("ray", "external")
DEVICE_NAMES = ("auto", "cpu", "cuda")
QUANTIZATION_NAMES = ("auto", "fp8", "none")
KV_DTYPE_NAMES = ("auto", "int8", "fp8", "fp8_e4m3")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")

_SIZES = {
    "tp": "tensor_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "dcp": "decode_context_parallel_size",
    "pp": "pipeline_parallel_size",
}  # what a layout's text calls them


def drafted_tokens(speculative: str | None) -> int:
    """How many tokens `prompt-lookup:K` drafts; 0 for None. Raises `ConfigError`."""
    if speculative is None:
        return 0
    name, _, count = speculative.partition(":")
    remedy = "use prompt-lookup:K with K in 1..64, as in prompt-lookup:4"
    require(
        name == "prompt-lookup" and count.isdecimal() and int(count) > 0, "speculative", speculative, "unknown", remedy
    )
    return int(count)


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the rank grid; world = pp · pcp · tp, and dcp re-uses ranks of the TP group.

    With `enable_expert_parallel` the experts of a mixture are split over tp · pcp ranks, else over tp. Each run of
    `ranks_per_node` ranks shares a machine; None means that all do, or what `node_of_rank` says: the machine of every
    rank as the executor found it.
    """

    tensor_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    ranks_per_node: int | None = None
    node_of_rank: tuple[int, ...] = ()

    @staticmethod
    def parse(field: str, text: str) -> ParallelConfig:
        """`tp=8,dcp=8` as a configuration; a size left out is 1. Raises `ConfigError`, which names the field."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            short, _, size = part.strip().partition("=")
            known = short in _SIZES and size.isdecimal()
            require(known, field, text, f"{part.strip()!r} is no size", "write it as tp=8,pcp=1,dcp=8,pp=1")
            sizes[_SIZES[short]] = int(size)
        return ParallelConfig(**sizes)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """As `tp=8,pcp=1,dcp=2,pp=1`, which `parse` reads."""
        return ",".join(f"{short}={getattr(self, name)}" for short, name in _SIZES.items())

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
            f"must divide tensor_parallel_size={tp}, whose ranks it re-uses",
            f"use one of {', '.join(divisors)}, or change tensor_parallel_size",
        )


@dataclass(frozen=True)
class OffloadConfig:
    """Where pages go that the prefix cache has no room for: host memory, then disk; sizes are for all ranks together.

    On disk it is a file in the folder `disk`, of at most `disk_bytes` (None: half of what is free there). `memory_file`
    and `disk_file` are what the driver has opened.
    """

    memory_bytes: int | None = None
    disk: str | None = None
    disk_bytes: int | None = None
    memory_file: str | None = None
    disk_file: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether any page is offloaded."""
        return self.memory_bytes is not None or self.disk is not None


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache: page size in tokens, memory a rank in bytes, or pages of each shard outright.

    Without `memory_bytes` it takes 1 GiB, or on a GPU what weights and workspace leave of `gpu_memory_utilization`.
    `memory_settled` says that `memory_bytes` was found to fit: other processes take it as it is. `dtype` is that of its
    rows: the model's (`auto`), or quantised with a scale for each token and head.
    """

    page_size: int = 16
    memory_bytes: int | None = None
    pages_per_shard: tuple[int, ...] | None = None
    enable_prefix_caching: bool = True
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    memory_settled: bool = False

    def __post_init__(self) -> None:
        require(
            self.enable_prefix_caching or not self.offload.is_on, "enable_prefix_caching", False,
            "offloaded pages are found by the prefix cache", "leave out --no-enable-prefix-caching or --kv-offload-*",
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


@dataclass(frozen=True)
class SchedulerConfig:
    """How work is batched.

    `max_num_batched_tokens` is the number of new tokens a step computes over all ranks, `max_num_seqs` how many
    requests run at once; None adapts to the other one, and `step_tokens` and `running_limit` are what holds.
    Contexts of up to `local_context` tokens stay on one shard (None: 512, or what a shard holds if that is less);
    `schedule` forces what travels. `prompt_lookup` is how many tokens a decoding request drafts at most. With
    `run_ahead` a step is planned and handed out while the one before it runs (None: on GPUs).
    """

    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    local_context: int | None = None
    schedule: str = "auto"
    prompt_lookup: int = 0
    run_ahead: bool | None = None

    def __post_init__(self) -> None:
        require(
            0 <= self.prompt_lookup <= 64, "prompt_lookup", self.prompt_lookup, "must be in 0..64", "0 drafts nothing"
        )
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
        """New tokens a step computes at most: what was asked for, or 2048, or enough for all requests to decode."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(DEFAULT_STEP_TOKENS, self.max_num_seqs or 0)

    @property
    def running_limit(self) -> int:
        """Requests that run at once at most: what was asked for, or 256, or as many as can decode in one step."""
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return min(DEFAULT_RUNNING, self.step_tokens)

    def on_shards(self, tokens: int) -> SchedulerConfig:
        """With `local_context` settled for shards of which the largest holds `tokens`. Raises `ConfigError`."""
        asked = self.local_context
        if asked is not None:
            require(
                asked <= tokens, "local_context", asked, f"exceeds the {tokens} tokens the largest shard holds",
                f"use at most {tokens}, or give the KV cache more memory",
            )  # fmt: skip
        return replace(self, local_context=min(DEFAULT_LOCAL_CONTEXT, tokens) if asked is None else asked)


@dataclass(frozen=True)
class ClusterConfig:
    """Ranks on other machines.

    `ray_address` is the Ray cluster to join, `host:port`; None starts one on this machine. At `listen`,
    `tcp://host:port`, ranks report that the user has started. `timeout` is how many seconds machines and ranks are
    waited for.
    """

    ray_address: str | None = None
    listen: str = "tcp://127.0.0.1:7850"
    timeout: float = 120.0

    def __post_init__(self) -> None:
        require(self.timeout > 0, "cluster_timeout", self.timeout, "must be positive", "give seconds")


@dataclass(frozen=True)
class LivenessConfig:
    """When a process that exists but does not go on counts as dead; all in seconds."""

    # of one step, once the engine has warmed up; None: the larger of `step_floor` and 20 times what recent steps let
    # expect
    step_timeout: float | None = None
    step_floor: float = 60.0  # a limit that nobody has given is never shorter
    heartbeat_interval: float = 1.0  # between two signs of life of a core or a rank
    heartbeat_late: float = 3.0  # silence after which `/health` says 503
    heartbeat_timeout: float = 10.0  # silence after which a core or rank that was ready counts as dead
    start_timeout: float = 300.0  # the same for a core that is not ready yet: C code may hold the interpreter for long
    # a token, as measured by the engine before this one if a step of it hung; this one then has limits from the start
    pace: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value is None or value > 0, name, value, "must be positive", "give seconds, or leave it out")


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine and its workers need to start; plain data, so it travels to processes.

    `quantization` says whether FP8 weights are kept: `auto` where PyTorch multiplies them as they are, `fp8`
    everywhere, `none` nowhere. `executor` is `auto` until `setup.resolve` has chosen: `processes` for several ranks on
    GPUs, else `threads`. With `enforce_eager` decode steps are not recorded as CUDA graphs. `cost` fixes the
    constants of the cost model, which are measured when the engine starts otherwise. With `trace` ranks record when
    they compute and transfer.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    executor: str = "auto"
    attention_backend: str = "auto"
    quantization: str = "auto"
    enforce_eager: bool = False
    seed: int = 0
    num_threads: int | None = None
    debug: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    cost: CostConstants | None = None
    trace: bool = False
    transfer: TransferConfig | None = None

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPE_NAMES)
        require_choice("device", self.device, DEVICE_NAMES)
        require_choice("quantization", self.quantization, QUANTIZATION_NAMES)
        require(
            not self.cache.offload.is_on or self.executor not in _SEVERAL_MACHINES,
            "executor", self.executor, "may have ranks on other machines, which cannot reach offloaded pages",
            "use processes, or leave out --kv-offload-memory and --kv-offload-disk",
        )  # fmt: skip
        require_choice("executor", self.executor, EXECUTOR_NAMES)
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
            f"decode_context_parallel_size={dcp} splits a head group's queries from its pages, so they must travel",
            "use --schedule auto, or decode_context_parallel_size=1",
        )
