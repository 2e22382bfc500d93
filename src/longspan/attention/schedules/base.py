"""The off-diagonal as a join of queries and pages (idea 5): what every schedule is given.

It owns the inputs and the registry's type; a schedule is one function in one file of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longspan.attention.forms import Form
from longspan.attention.partial import Partial
from longspan.parallel.collectives import Collectives
from longspan.reach import Reach


@dataclass(frozen=True)
class ContextGroup:
    """The context group as attention sees it; `workspace_tokens` bounds what a schedule may gather at once."""

    collectives: Collectives
    shards_of_pcp: tuple[tuple[int, ...], ...]
    workspace_tokens: int


@dataclass(frozen=True)
class Join:
    """One layer's travelling queries of one class on one rank, and the pages stored here.

    q [T, Hq, D] are this rank's travelling rows, kv [planes, Hkv, slots, D] its pool.
    """

    q: Tensor
    kv: Tensor
    reach: Reach
    form: Form
    group: ContextGroup


Schedule = Callable[[Join], Partial]
