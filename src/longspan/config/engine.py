"""The configuration of an engine, checked before anything is allocated.

It owns the fields, their defaults and the checks that need no model; it must not import torch or know how an option is
implemented.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Unpack

from longspan.config.cache import CacheConfig
from longspan.config.checks import parse_integers, require, require_choice
from longspan.config.cost import CostConstants, read_constants
from longspan.config.option import OPTION, Option, build, check_keywords, option
from longspan.config.parallel import ParallelConfig
from longspan.config.products import ProductChoice
from longspan.config.scheduling import SchedulerConfig
from longspan.config.transfer import TransferConfig

if TYPE_CHECKING:
    from longspan.config.keywords import EngineOptions

EXECUTOR_NAMES = ("auto", "threads", "processes", "ray", "external", "dry")
_SEVERAL_MACHINES = ("ray", "external")
LOAD_FORMAT_NAMES = ("auto", "dummy")
DEVICE_NAMES = ("auto", "cpu", "cuda")
QUANTIZATION_NAMES = ("auto", "fp8", "fp16", "int8", "auto-fast", "none")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
CPU_KERNEL_NAMES = ("auto", "compiled", "plain")


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
