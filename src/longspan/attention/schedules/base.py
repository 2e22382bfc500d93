"""The off-diagonal as a join of queries and pages (idea 5): what every schedule is given.

It owns the inputs and the registry's type; a schedule is one function in one file of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from longspan.attention.backends.base import Backend
from longspan.attention.heads import HeadBlock
from longspan.attention.partial import Partial
from longspan.parallel.collectives import Collectives
from longspan.view import ClassView, QueryRun


@dataclass(frozen=True)
class Heads:
    """Head counts and groupings of one rank.

    `own` maps this rank's query heads, `shard` all query heads of its DCP group (in dcp order), to the KV heads
    stored here. `own_count` query heads are this rank's.
    """

    own_count: int
    own: tuple[HeadBlock, ...]
    shard: tuple[HeadBlock, ...]
    shards_of_pcp: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Join:
    """One layer's travelling queries of one class on one rank, and the pages stored here.

    q [T, Hq, D] are this rank's travelling rows, kv [planes, Hkv, slots, D] its pool; `workspace_tokens` bounds
    what a schedule may gather at once, `value_dim` is the width of a result.
    """

    q: Tensor
    kv: Tensor
    view: ClassView
    heads: Heads
    scale: float
    backend: Backend
    group: Collectives
    workspace_tokens: int
    value_dim: int

    def attend_here(self, q: Tensor, runs: Sequence[QueryRun], blocks: Sequence[HeadBlock]) -> Partial:
        """Attend q to this rank's own pages."""
        return self.attend(q, runs, self.kv, blocks)

    def attend(self, q: Tensor, runs: Sequence[QueryRun], kv: Tensor, blocks: Sequence[HeadBlock]) -> Partial:
        """Attend q to keys and values that were brought here."""
        return self.backend.unmasked(q, runs, kv, blocks, self.scale).columns(self.value_dim)


Schedule = Callable[[Join], Partial]
