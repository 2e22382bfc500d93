"""What an attention backend must do: attention that returns `Partial`s, their merge, and writing the cache.

It owns the interface; a backend knows tensors and heads, never ranks or schedules.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from longspan.attention.partial import Partial
from longspan.attention.rows import CacheRows
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun


class Writer(Protocol):
    """Where a step's rows go, prepared once and used by every layer."""

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """Store rows of k, v [T, Hkv, D] in `cache`, quantised as it is; a cache of one plane takes k alone."""
        ...


class Backend(Protocol):
    """Attention over local tensors."""

    def begin(self) -> None:
        """A new step: what was prepared for the last one's runs may be forgotten."""
        ...

    def writer(self, writes: Sequence[WriteRun], rows: int) -> Writer:
        """Of a step with `rows` rows; rows that no run names are not written."""
        ...

    def causal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        window: int | None = None,
    ) -> Partial:
        """The diagonal: q [T, Hq, D] against k [T, Hkv, D] and v [T, Hkv, Dv <= D] of the same tokens, causal.

        Without v the rows of k are keys and values, as in a cache of one plane, and a result is as wide as that of
        `attend` over such a cache. Under a window a row sees as many tokens, its own with them.
        """
        ...

    def attend(
        self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, blocks: Sequence[HeadBlock], scale: float
    ) -> Partial:
        """The off-diagonal: each run's rows of q [T, Hq, D] against its spans of `kv`: out [T, Hq, D].

        Rows of no run give the identity, and so do rows whose `lows` leave them nothing.
        """
        ...

    def merge(self, parts: Sequence[Partial]) -> Partial:
        """`partial.merge`, the same to rounding."""
        ...


class StaticRuns(Sequence[QueryRun]):
    """Runs of one token that stay at one address in device memory: what a recorded step attends to."""

    @abstractmethod
    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """Attend to `runs` from now on. False, and nothing done, if they need more room than there is."""


class StaticWriter(Writer, Protocol):
    """Slots that stay at one address."""

    def refill(self, writes: Sequence[WriteRun]) -> None:
        """Other runs for the same number of rows."""
        ...


@runtime_checkable
class StaticBackend(Protocol):
    """A backend whose calls can be recorded: `attend` takes `StaticRuns` where it takes runs."""

    def begin(self) -> None:
        """See `Backend.begin`."""
        ...

    def static(self, rows: int) -> StaticRuns:
        """Runs to be filled, for `rows` query rows."""
        ...

    def writer(self, writes: Sequence[WriteRun], rows: int) -> StaticWriter:
        """See `Backend.writer`."""
        ...
