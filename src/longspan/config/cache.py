"""The KV cache, and where pages go that it evicts.

It owns sizes and data types as the user gives them; it must not know how many bytes a token has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.config.checks import parse_bytes, parse_integers, require, require_choice
from longspan.config.option import option

KV_DTYPE_NAMES = ("auto", "int8", "fp8", "fp8_e4m3")


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
