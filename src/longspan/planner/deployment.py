"""A model under a layout on a machine.

It owns what the planner's formulas ask of such a deployment; what fits into memory is the engine's own sum.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

from longspan.attention.facts import AttentionShape, ExpansionCost
from longspan.engine.capacity import RankMemory
from longspan.parallel.sharding import Sharding
from longspan.planner.hardware import Hardware


@dataclass(frozen=True)
class TravellingShape(AttentionShape):
    """Heads whose partial results travel in elements of another size."""

    partial_element_bytes: int = 4

    @property
    def partial_bytes(self) -> int:
        """Bytes of one token's partial result: out and an fp32 lse of every head."""
        return self.q_heads * self.out_dim * self.partial_element_bytes + self.lse_bytes


@dataclass(frozen=True)
class Deployment(RankMemory):
    """See `RankMemory`; `partial_element_bytes` is the size in which results of attention travel."""

    hardware: Hardware
    partial_element_bytes: int = 4

    def on(self, machine: Hardware) -> Deployment:
        """The same on another machine; what has been worked out so far depends on none."""
        other = copy(self)
        object.__setattr__(other, "hardware", machine)
        return other

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prompt's chunk: as many steps as stages are under way, and share what is computed at once."""
        return math.ceil(self.max_num_batched_tokens / self.grid.pp)

    @property
    def attention_shape(self) -> AttentionShape:
        """One rank's heads; what travels has the cache's element size."""
        mla = self.model.mla
        start, stop = Sharding(self.grid, 0, self.model.num_q_heads, self.model.num_kv_heads).q_extent
        return TravellingShape(
            q_heads=stop - start,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            element_bytes=self.layout.element_bytes,
            planes=self.layout.planes,
            value_dim=self.model.cached_value_dim,
            expansion=ExpansionCost.of(mla.kv_lora_rank, mla.rope_dim, mla.query_dim, mla.value_dim)
            if mla else ExpansionCost(),
            partial_element_bytes=self.partial_element_bytes,
        )  # fmt: skip
