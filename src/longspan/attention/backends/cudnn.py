"""Long prefills by cuDNN's attention, through PyTorch; all other work by the Triton backend.

It owns the call of the library, and when it may be used; which parts of a step it takes is in `cudnn_blocks.py`. cuDNN
plans once for each shape, so calls have few sizes, and warm-up runs all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.backends import triton
from longspan.attention.backends.base import (
    AttentionBackend,
    Backend,
    BackendShape,
    PreparedDiagonal,
    PreparedRuns,
    RecordableBackend,
    RefillableRuns,
    RefillableWriter,
    Writer,
    half_precision_problem,
)
from longspan.attention.backends.cudnn_blocks import MERGED, LibraryBlock, LibraryPiece, LibraryUse, divide
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.step_buffer import StepBuffer
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun

_LOG = logging.getLogger("longspan.engine")
_CAPABILITY = 8  # Ampere; the library has no such kernels for older GPUs
_WIDEST = 128  # most elements of a head
_ALIGNMENT = 8  # elements of 16 bits in 16 bytes, of which a head must be a multiple
_REACHABLE = 2**31  # elements that a call may have to step over between its first and its last
_FASTER = 9  # the generation on which the library was measured to be faster: Hopper
_TOLERANCE = 0.02  # largest error of the trial call, relative to the largest element of the expected result
Product = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(q [1, Hq, T, D], k and v [1, Hkv, S, D], causal, scale) → (out [1, Hq, T, D], natural lse of Hq · T elements).

With `causal` T and S are equal, and a row sees the keys up to its own.
"""


class CudnnBackend(RecordableBackend):
    """`inner` for everything but the pieces that are large enough for `product`.

    Nothing that is recorded in a CUDA graph calls the library.
    """

    def __init__(self, inner: RecordableBackend, product: Product, use: LibraryUse | None = None) -> None:
        self._inner = inner
        self._product = product
        self._use = use or LibraryUse()

    causal_runs = True

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> PreparedRuns:
        """See `Backend.prepare`."""
        blocks, rest = divide(runs, self._use)
        if not blocks:
            return self._inner.prepare(runs, rows)
        left = self._inner.prepare(rest, rows) if rest else None
        return _Runs(self._inner, self._product, rows, blocks, rest, left)

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> PreparedDiagonal:
        """See `Backend.prepare_diagonal`."""
        large = [each for each in segments if each[1] in self._use.rows]
        if window is not None or not large:
            return self._inner.prepare_diagonal(segments, rows, window)
        rest = [each for each in segments if each not in large]
        return _Diagonal(self._product, rows, large, self._inner.prepare_diagonal(rest, rows, None) if rest else None)

    def refillable(self, rows: int, slots: int, buffer: StepBuffer) -> RefillableRuns:
        """See `RecordableBackend.refillable`."""
        return self._inner.refillable(rows, slots, buffer)

    def indexed(self, rows: int, longest: int, index: int) -> RefillableRuns | None:
        """See `RecordableBackend.indexed`."""
        return self._inner.indexed(rows, longest, index)

    def writer(self, writes: Sequence[WriteRun], rows: int, buffer: StepBuffer | None = None) -> RefillableWriter:
        """See `RecordableBackend.writer`."""
        return self._inner.writer(writes, rows, buffer)

    def slot_writer(self, slots: Tensor) -> Writer | None:
        """See `Backend.slot_writer`."""
        return self._inner.slot_writer(slots)

    def merge(self, parts: Sequence[AttentionState], dtype: torch.dtype | None = None) -> AttentionState:
        """See `Backend.merge`."""
        return self._inner.merge(parts, dtype)


@dataclass(frozen=True)
class _Runs:
    """See `PreparedRuns`."""

    # merges, and computed `left`
    inner: Backend
    # the library
    product: Product
    # query rows
    rows: int
    # the rows for the library
    blocks: Sequence[LibraryBlock]
    # the runs over everything else
    rest: Sequence[QueryRun]
    # these, prepared; None without any
    left: PreparedRuns | None

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        # parts are all in the dtype of q, as the library's are: there are few kinds of merges then
        whole = _empty(q, kv.width) if self.left is None else self.left.attend(q, kv, blocks, scale, q.dtype)
        if self.blocks[0].length == self.rows:  # then it is the only one
            return self._merged(self.blocks[0], whole, q, kv, blocks, scale, dtype)
        result = whole if dtype else AttentionState(whole.out.to(whole.lse.dtype), whole.lse)
        for block in self.blocks:
            merged = self._merged(block, whole, q, kv, blocks, scale, dtype)
            result.out[block.used], result.lse[block.used] = merged.out, merged.lse
        return result

    def _merged(
        self, block: LibraryBlock, whole: AttentionState, q: Tensor, kv: CacheRows, blocks: Sequence[HeadBlock],
        scale: float, dtype: torch.dtype | None,
    ) -> AttentionState:  # fmt: skip
        """The state of the used rows of a block: its pieces, and what `whole` has of the rest."""
        parts = [self._piece(block, piece, q, kv, blocks, scale) for piece in block.pieces]
        if any(run.row == block.first for run in self.rest):
            parts.append(AttentionState(whole.out[block.used], whole.lse[block.used]))
        while len(parts) > MERGED:  # merged ones go to the end: each part is rounded in few merges
            parts = [*parts[MERGED:], self.inner.merge(parts[:MERGED], q.dtype)]
        return self.inner.merge(parts, dtype)

    def _piece(
        self, block: LibraryBlock, piece: LibraryPiece, q: Tensor, kv: CacheRows, blocks: Sequence[HeadBlock],
        scale: float,
    ) -> AttentionState:  # fmt: skip
        """The state of one piece, of those rows of its block whose results are used. q [T, Hq, D] are all rows."""
        values = kv.take(piece.spans).values
        if values.stride(1) * values.shape[1] >= _REACHABLE:
            values = values.contiguous()
        rows = q[block.row : block.row + block.length]
        state = _call(self.product, rows, values[0], values[1], blocks, scale, piece.causal)
        known = block.first - block.row
        return AttentionState(state.out[known:], state.lse[known:])


@dataclass(frozen=True)
class _Diagonal:
    """See `PreparedDiagonal`."""

    # the library
    product: Product
    # query rows
    rows: int
    # segments for the library: first row, length
    large: Sequence[tuple[int, int]]
    # the others, prepared; None without any
    left: PreparedDiagonal | None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedDiagonal.attend`."""
        keys, values = k.transpose(0, 1), (k if v is None else v).transpose(0, 1)
        if self.left is None and self.large[0][1] == self.rows:
            return _call(self.product, q, keys, values, blocks, scale, True)
        whole = _empty(q, values.shape[-1]) if self.left is None else self.left.attend(q, k, v, blocks, scale)
        for row, length in self.large:
            at = slice(row, row + length)
            state = _call(self.product, q[at], keys[:, at], values[:, at], blocks, scale, True)
            whole.out[at], whole.lse[at] = state.out, state.lse
        return whole


def _empty(q: Tensor, width: int) -> AttentionState:
    """The identity for queries q [T, Hq, D] and values of `width` elements."""
    return AttentionState.empty(q.shape[0], q.shape[1], width, q)


def _call(
    product: Product, q: Tensor, keys: Tensor, values: Tensor, blocks: Sequence[HeadBlock], scale: float, causal: bool
) -> AttentionState:
    """q [T, Hq, D] against keys [Hkv, S, D] and values [Hkv, S, Dv]: out in the dtype of q, lse in fp32.

    Every row sees some key, so there is nothing to normalise: the library's logarithms are natural.
    """
    rows, heads = q.transpose(0, 1)[None], []
    for block in blocks:
        q_heads, kv_heads = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
        out, lse = product(rows[:, q_heads], keys[None, kv_heads], values[None, kv_heads], causal, scale)
        heads.append((out[0].transpose(0, 1), lse.reshape(-1, len(q)).t()))
    if len(heads) == 1:
        return AttentionState(*heads[0])
    outs, logs = zip(*heads, strict=True)
    return AttentionState(torch.cat(outs, 1), torch.cat(logs, 1))


def cudnn_product(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """See `Product`. There may be fewer KV heads than query heads."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def problem_of_library(device: torch.device, shape: BackendShape) -> str | None:
    """Why the library cannot be used on this device; None if it can. Runs it once and compares the result."""
    major, _ = torch.cuda.get_device_capability(device)
    if major < _CAPABILITY:
        return f"cuDNN needs compute capability {_CAPABILITY}.0, this GPU's is {major}.x"
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(512, heads, shape.head_dim, device=device, generator=generator)
        .to(shape.dtype)
        .transpose(0, 1)[None]
        for heads in (4, 2, 2)
    )
    try:
        out, lse = cudnn_product(q, k, v, False, 0.1)
    except RuntimeError as problem:
        return f"cuDNN's attention fails: {str(problem).splitlines()[0]}"
    scores = q[0].float() @ k[0].float().repeat_interleave(2, 0).mT * 0.1
    expected = scores.softmax(-1) @ v[0].float().repeat_interleave(2, 0)
    logs = scores.logsumexp(-1)
    error = max(float(_off(out[0], expected)), float(_off(lse.view(logs.shape), logs)))
    return None if error < _TOLERANCE else f"cuDNN's attention is off by {error:.1%}"


def _off(found: Tensor, expected: Tensor) -> Tensor:
    """The largest error, relative to the largest element."""
    return (found.float() - expected).abs().max() / expected.abs().max()


def _supports(shape: BackendShape) -> str | None:
    """See `AttentionBackend.supports`."""
    if shape.kv_factor == 1:
        return "reads keys and values, not latents"
    if shape.head_dim > _WIDEST or shape.head_dim % _ALIGNMENT:
        return f"takes heads of up to {_WIDEST} elements, in multiples of {_ALIGNMENT}, not {shape.head_dim}"
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return f"needs cuDNN, which PyTorch {torch.__version__} lacks here"
    return half_precision_problem(shape) or triton.BACKEND.supports(shape)


def _unwanted(shape: BackendShape) -> str | None:
    """See `AttentionBackend.unwanted`."""
    if shape.capability == _FASTER:
        return None
    return f"was measured to be faster on compute capability {_FASTER}.x only, this GPU's is {shape.capability}.x"


def _build(device: torch.device, shape: BackendShape) -> Backend:
    inner, problem = triton.BACKEND.build(device, shape), problem_of_library(device, shape)
    if problem is not None:
        _LOG.warning("attention: Triton computes long prefills too: %s", problem)
    return CudnnBackend(inner, cudnn_product) if isinstance(inner, RecordableBackend) and not problem else inner


BACKEND = AttentionBackend(
    "cudnn", devices=("cuda",), supports=_supports, build=_build, package="triton", unwanted=_unwanted,
    reason="long prefills by cuDNN, with 600 to 640 TFLOP/s on an H100 where Triton has 430 to 510; the rest by Triton",
    long_steps=LibraryUse().steps,
)  # fmt: skip
