"""How many ranks there are, and what each kind of them splits.

It owns the sizes of a layout and their text; it must not know where ranks run.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from longspan.config.checks import require
from longspan.config.option import option

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
