"""Accelerators by name, and what the cost model makes of them.

It owns the table's file and the efficiencies; it must not know models or layouts.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from longspan.attention.cost import CostConstants
from longspan.errors import ConfigError

_ATTENTION_EFFICIENCY = 0.6  # of the peak, FlashAttention-3 on long prompts
_MEMORY_EFFICIENCY = 0.8
_LINK_EFFICIENCY = 0.5  # point to point between machines: 20-26 of 50 GB/s in the million-token paper
_INTRA_EFFICIENCY = 0.8
_KERNEL_S, _MESSAGE_S = 3e-6, 1e-5


@dataclass(frozen=True)
class Hardware:
    """One accelerator: dense bf16 TFLOP/s, memory in GB and TB/s, links in GB/s in one direction."""

    tflops: float
    memory_gb: float
    memory_tb_s: float
    intra_gb_s: float
    inter_gb_s: float

    @property
    def cost(self) -> CostConstants:
        """Constants at the efficiencies others have reached; a transfer hides behind computing altogether."""
        memory = 1 / (self.memory_tb_s * 1e12 * _MEMORY_EFFICIENCY)
        return CostConstants(
            call_s=_KERNEL_S,
            flop_s=1 / (self.tflops * 1e12 * _ATTENTION_EFFICIENCY),
            read_s=memory,
            copy_s=memory,
            message_s=_MESSAGE_S,
            byte_s=1 / (self.intra_gb_s * 1e9 * _INTRA_EFFICIENCY),
            cross_message_s=_MESSAGE_S,
            cross_byte_s=1 / (self.inter_gb_s * 1e9 * _LINK_EFFICIENCY),
            hidden=1.0,
        )


def hardware(name: str) -> Hardware:
    """The accelerator of that name; raises `ConfigError` with the names there are."""
    table = tomllib.loads(files("longspan").joinpath("hardware.toml").read_text())
    if name not in table:
        raise ConfigError("hardware", name, "is not in the table", f"use one of {', '.join(table)}")
    return Hardware(**table[name])
