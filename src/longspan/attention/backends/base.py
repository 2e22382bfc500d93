"""What an attention backend must do: two calls that return `Partial`s.

It owns the interface; a backend knows tensors and heads, never ranks or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from longspan.attention.heads import HeadBlock
from longspan.attention.partial import Partial
from longspan.reach import QueryRun


class Backend(Protocol):
    """Attention over local tensors."""

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float, window: int | None = None
    ) -> Partial:
        """The diagonal: q [T, Hq, D] against k [T, Hkv, D] and v [T, Hkv, Dv <= D] of the same tokens, causal.

        Under a window a row sees as many tokens, its own with them.
        """
        ...

    def attend(
        self, q: Tensor, runs: Sequence[QueryRun], kv: Tensor, blocks: Sequence[HeadBlock], scale: float
    ) -> Partial:
        """The off-diagonal: each run's rows of q [T, Hq, D] against its spans of kv [planes, Hkv, slots, D].

        Rows of no run give the identity, and so do rows whose `lows` leave them nothing.
        """
        ...
