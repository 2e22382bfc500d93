"""What an attention backend is: a record in a file of its own, and an object that prepares a step for all its layers.

It owns these interfaces. A backend knows tensors and heads; it must not know ranks or schedules.
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
from longspan.attention.step_buffer import StepBuffer
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun


@dataclass(frozen=True)
class BackendShape:
    """What a backend must be able to compute for a model."""

    # elements of a cached row
    head_dim: int
    # elements of a result over cached rows; fewer than `head_dim` for latents
    value_dim: int
    # rows of a cached token in each KV head: 2 for keys and values, 1 for latents
    kv_factor: int
    # whether cached rows are quantised
    quantised: bool
    # dtype of queries
    dtype: torch.dtype
    # whether kernels that are compiled on this machine may be used
    compiled: bool = False
    # major number of the GPU's compute capability; 0 without one
    capability: int = 0


@dataclass(frozen=True)
class AttentionBackend:
    """The record of a backend: where it runs, what it supports, and how it is built."""

    # name in options and messages
    name: str
    # device types on which it runs; empty for all
    devices: tuple[str, ...]
    # returns why it cannot compute a shape, or None if it can
    supports: Callable[[BackendShape], str | None]
    # builds the backend for a device; only this imports its library
    build: Callable[[torch.device, BackendShape], Backend]
    # package that must be installed; None if none is needed
    package: str | None = None
    # whether `auto` may choose it; `auto` takes the first suitable one in the order of the table
    automatic: bool = True
    # returns why `auto` does not take it for a shape that it supports, or None if it does
    unwanted: Callable[[BackendShape], str | None] = lambda shape: None
    # why `auto` takes it, for people
    reason: str = "serves this model on this device"
    # returns which of its kernels computes a shape, for people, or None if there is nothing to say
    detail: Callable[[BackendShape], str | None] = lambda shape: None
    # (new tokens, tokens of each shard before them, whether these are in several runs) of prefills for which it
    # prepares something on first use
    long_steps: tuple[tuple[int, int, bool], ...] = ()
    # whether it has causal runs, and writers to slots that only the device knows
    device_slots: bool = False


def half_precision_problem(shape: BackendShape) -> str | None:
    """Why a library that computes in 16 bits, on unquantised rows, cannot compute a shape; None if it can."""
    if shape.quantised:
        return "cannot read a cache with a scale for each row"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(shape.dtype).removeprefix('torch.')}"
    return None


class Writer(Protocol):
    """Writes a step's KV to the slots of the rows. Prepared once and used in every layer."""

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """Write k and v [T, Hkv, D] to `cache`, quantised if it is. With `kv_factor` 1 only k is written."""
        ...


class PreparedRuns(Protocol):
    """Runs of query rows against cached rows, prepared for all layers of a step."""

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """Attention of each run's rows of q [T, Hq, D] to its spans of `kv`.

        Returns out [T, Hq, Dv], where Dv may also be D for latents: only the first `value_dim` elements are used. Rows
        of no run get the identity, and so do rows whose window start leaves out all slots.

        Args:
            q: queries, in the dtype of the model.
            kv: cached rows.
            blocks: which query heads of q read which KV heads of `kv`.
            scale: factor on scores.
            dtype: if nothing will be merged with the result, the dtype in which out is wanted. A backend may still
                return fp32.
        """
        ...


class PreparedDiagonal(Protocol):
    """Attention of segments to themselves, prepared for all layers of a step."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """Causal attention of q [T, Hq, D] to k [T, Hkv, D] and v [T, Hkv, Dv] of the same tokens: out [T, Hq, Dv].

        Rows of no segment get the identity. Dv is at most D. Without v the rows of k are keys and values, as in a cache
        with `kv_factor` 1, and the result is as wide as that of `PreparedRuns.attend` on such a cache. `blocks`,
        `scale` and `dtype` are as there.
        """
        ...


class Backend(ABC):
    """Attention on the tensors of one rank."""

    # whether runs may be causal: segments then attend to their own tokens in the cache, together with earlier ones
    causal_runs: bool = False

    @abstractmethod
    def prepare(self, runs: Sequence[QueryRun], rows: int) -> PreparedRuns:
        """Prepare runs over `rows` query rows, once for all layers of a step.

        What depends on the runs alone is computed here or at first use, and kept until the step is over.
        """

    @abstractmethod
    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> PreparedDiagonal:
        """Prepare the diagonals of segments (first row, length), in order, among `rows` rows.

        A row sees `window` tokens, its own included; None for all.
        """

    @abstractmethod
    def writer(self, writes: Sequence[WriteRun], rows: int) -> Writer:
        """Prepare the writes of a step with `rows` rows. Rows of no run are not written."""

    def slot_writer(self, slots: Tensor) -> Writer | None:
        """A writer of rows to `slots` int32 [T] on the device, of which nothing is read back; rows with -1 are not
        written. None if the backend has none."""
        return None

    @abstractmethod
    def merge(self, parts: Sequence[AttentionState], dtype: torch.dtype | None = None) -> AttentionState:
        """The merge of `attention.state.merge`, equal up to rounding. All parts have one shape.

        `dtype` is that of `PreparedRuns.attend`.
        """

    def attend(
        self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, blocks: Sequence[HeadBlock], scale: float
    ) -> AttentionState:
        """`PreparedRuns.attend`, for runs that are used once."""
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
        """`PreparedDiagonal.attend`, for one segment that is used once."""
        return self.prepare_diagonal(((0, len(q)),), len(q), window).attend(q, k, v, blocks, scale)


class RefillableRuns(PreparedRuns, Protocol):
    """Runs in buffers at fixed device addresses, so that a CUDA graph can be replayed with others."""

    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """Replace the runs. Returns False, and changes nothing, if the buffers are too small for them."""
        ...


class RefillableWriter(Writer, Protocol):
    """A writer whose slots are in a buffer at a fixed device address."""

    def refill(self, writes: Sequence[WriteRun]) -> None:
        """Replace the runs; the number of rows stays the same."""
        ...


class RecordableBackend(Backend):
    """A backend whose calls can be captured in a CUDA graph, because what it prepares can be refilled in place."""

    @abstractmethod
    def refillable(self, rows: int, slots: int, buffer: StepBuffer) -> RefillableRuns:
        """Runs over `rows` query rows in a pool of `slots` slots, which see nothing until they are filled.

        What `fill` sends may be put into `buffer`, which the caller sends when everything is filled.
        """

    def indexed(self, rows: int, longest: int, index: int) -> RefillableRuns | None:
        """Runs of up to `longest` rows each, causal ones too, with room for `index` slots of short spans.

        What `fill` sends is sent by itself. None if the backend has no such runs.
        """
        return None

    @abstractmethod
    def writer(self, writes: Sequence[WriteRun], rows: int, buffer: StepBuffer | None = None) -> RefillableWriter:
        """See `Backend.writer`. With a `buffer`, `refill` may leave the sending to the caller."""
