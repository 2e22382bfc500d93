"""What an attention backend is: one record in one file, and an object that prepares a step once for all its layers.

It owns the interfaces; a backend knows tensors and heads, never ranks or schedules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun


@dataclass(frozen=True)
class BackendShape:
    """What a model asks of a backend."""

    # elements of a cached row
    head_dim: int
    # of which attention returns the first
    value_dim: int
    # 2 for keys and values, 1 for latents
    kv_factor: int
    # whether rows have scales
    quantised: bool
    # of the queries
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention: where it runs, what it serves, how it is made."""

    # as options and notes have it
    name: str
    # device types it runs on; none named: all
    devices: tuple[str, ...]
    # why it cannot serve a shape; None if it can
    supports: Callable[[BackendShape], str | None]
    # the backend on a device; imports its library only now
    build: Callable[[torch.device, BackendShape], Backend]
    # package that must be installed
    package: str | None = None
    # whether `auto` may choose it: the first that can serve, in the order of the table
    automatic: bool = True


def half_precision_problem(shape: BackendShape) -> str | None:
    """What keeps a library from a shape that computes in 16 bits over rows as they are."""
    if shape.quantised:
        return "cannot read a cache with a scale for each row"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(shape.dtype).removeprefix('torch.')}"
    return None


class Writer(Protocol):
    """Where a step's rows go, prepared once and used by every layer."""

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """Store rows of k, v [T, Hkv, D] in `cache`, quantised as it is; a cache of one plane takes k alone."""
        ...


class PreparedRuns(Protocol):
    """Runs of rows against cached rows (the off-diagonal), ready for every layer of a step."""

    def attend(self, q: Tensor, kv: CacheRows, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """Each run's rows of q [T, Hq, D] against its spans of `kv`: out [T, Hq, D], or as wide as a row's values.

        Rows of no run give the identity, and so do rows whose `window_starts` leave them nothing.
        """
        ...


class PreparedDiagonal(Protocol):
    """New tokens against themselves, ready for every layer of a step."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, blocks: Sequence[HeadBlock], scale: float
    ) -> AttentionState:
        """q [T, Hq, D] against k [T, Hkv, D] and v [T, Hkv, Dv <= D] of the same tokens, causal: out [T, Hq, Dv].

        Without v the rows of k are keys and values, as in a cache of one plane, and a result is as wide as that of
        `PreparedRuns.attend` over such a cache.
        """
        ...


class Backend(ABC):
    """Attention over local tensors."""

    @abstractmethod
    def prepare(self, runs: Sequence[QueryRun], rows: int) -> PreparedRuns:
        """For `rows` rows of queries, once a step: whatever the runs alone decide is worked out here or at first use,
        and kept until the step is over."""

    @abstractmethod
    def prepare_diagonal(self, tokens: int, window: int | None) -> PreparedDiagonal:
        """For a segment of `tokens` tokens; under a window a row sees as many tokens, its own with them."""

    @abstractmethod
    def writer(self, writes: Sequence[WriteRun], rows: int) -> Writer:
        """Of a step with `rows` rows; rows that no run names are not written."""

    @abstractmethod
    def merge(self, parts: Sequence[AttentionState]) -> AttentionState:
        """`state.merge`, the same to rounding."""

    def attend(
        self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, blocks: Sequence[HeadBlock], scale: float
    ) -> AttentionState:
        """`PreparedRuns.attend` of runs that are used once."""
        return self.prepare(runs, len(q)).attend(q, kv, blocks, scale)

    def causal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        window: int | None = None,
    ) -> AttentionState:
        """`PreparedDiagonal.attend` of a segment that is attended once."""
        return self.prepare_diagonal(len(q), window).attend(q, k, v, blocks, scale)


class RefillableRuns(PreparedRuns, Protocol):
    """Runs of one token that stay at one address in device memory: what a recorded step attends to."""

    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """Attend to `runs` from now on. False, and nothing done, if they need more room than there is."""
        ...


class RefillableWriter(Writer, Protocol):
    """Slots that stay at one address."""

    def refill(self, writes: Sequence[WriteRun]) -> None:
        """Other runs for the same number of rows."""
        ...


class RecordableBackend(Backend):
    """A backend whose calls can be recorded, since what it prepared can be refilled."""

    @abstractmethod
    def refillable(self, rows: int) -> RefillableRuns:
        """Runs to be filled, for `rows` rows of queries."""

    @abstractmethod
    def writer(self, writes: Sequence[WriteRun], rows: int) -> RefillableWriter:
        """See `Backend.writer`."""
