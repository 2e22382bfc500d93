"""A model under a layout on a machine.

It owns what the planner's formulas ask of such a deployment; what fits into memory is the engine's own sum.
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
    """See `RankMemory`; `state_element_bytes` is the size in which results of attention travel."""

    hardware: Hardware
    state_element_bytes: int = 4

    def on(self, machine: Hardware) -> Deployment:
        """The same on another machine; what has been worked out so far depends on none."""
        other = copy(self)
        object.__setattr__(other, "hardware", machine)
        return other

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prompt's chunk: as many steps as stages are in flight, and share what is computed at once."""
        return math.ceil(self.max_num_batched_tokens / self.grid.pp)

    @property
    def attention_shape(self) -> AttentionShape:
        """The engine's own, but for the size in which results travel."""
        shape = attention_shape(self.grid, self.model, self.layout, int(self.weights.embedding))
        return replace(shape, state_element_bytes=self.state_element_bytes)
