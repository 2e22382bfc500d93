"""A model under a layout on given hardware.

It owns what the planner's formulas need to know of a deployment. The memory of a rank is computed by the engine's own
`RankMemory`.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace

from longspan.attention.workload import AttentionShape
from longspan.engine.capacity import RankMemory, attention_shape
from longspan.planner.hardware import Hardware


@dataclass(frozen=True)
class Deployment(RankMemory):
    """`RankMemory` with the hardware that its ranks run on."""

    hardware: Hardware
    state_element_bytes: int = 4  # bytes of an element of attention states when ranks exchange them

    def on(self, machine: Hardware) -> Deployment:
        """The same deployment on other hardware. Cached properties are kept: none depends on the hardware."""
        other = copy(self)
        object.__setattr__(other, "hardware", machine)
        return other

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prompt's chunk. As many steps as stages are in flight, and each has its share of the budget."""
        return math.ceil(self.max_num_batched_tokens / self.grid.pp)

    @property
    def attention_shape(self) -> AttentionShape:
        """The engine's own shape, with the element size of exchanged attention states."""
        shape = attention_shape(self.grid, self.model, self.layout, int(self.weights.embedding))
        return replace(shape, state_element_bytes=self.state_element_bytes)
