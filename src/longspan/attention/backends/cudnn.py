"""Long prefills by cuDNN's attention, through PyTorch; all other work by the Triton backend.

It owns which parts of a step are large enough for a call of the library, and the call. cuDNN plans once for each shape,
so pieces have few sizes: columns are cut into powers of two, and rows are padded to a multiple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    half_precision_problem,
)
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.step_buffer import StepBuffer
from longspan.cache.pages import Span, clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun

_CAPABILITY = 8  # Ampere; the library has no such kernels for older GPUs
_WIDEST = 128  # most elements of a head
_ALIGNMENT = 8  # elements of 16 bits in 16 bytes, of which a head must be a multiple
_REACHABLE = 2**31  # elements that a call may have to step over between its first and its last
_TOLERANCE = 0.02  # largest error of the trial call, relative to the largest element of the expected result
Product = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(q [1, Hq, T, D], k and v [1, Hkv, S, D], causal, scale) → (out [1, Hq, T, D], natural lse of Hq · T elements).

With `causal` T and S are equal, and a row sees the keys up to its own.
"""


@dataclass(frozen=True)
class LibraryUse:
    """When a call of the library pays: its result is written and read again to be merged."""

    # fewest rows of a run
    rows: int = 2048
    # rows of a call are padded to a multiple of this
    row_multiple: int = 512
    # fewest columns of a piece, a power of two
    columns: int = 8192
    # most columns of a piece, a power of two
    most_columns: int = 131072
    # most spans of a piece: several are copied together, one after the other
    spans: int = 64


@dataclass(frozen=True)
class LibraryPiece:
    """Rows and columns for one call: all rows see all columns, or with `causal` those up to their own."""

    # first row
    row: int
    # number of rows
    length: int
    # the columns
    spans: tuple[Span, ...]
    # whether the columns are the rows' own tokens
    causal: bool = False

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.row, self.row + self.length)


def divide(runs: Sequence[QueryRun], use: LibraryUse) -> tuple[list[list[LibraryPiece]], list[QueryRun]]:
    """(the pieces of each run that has some, the runs over everything else)."""
    pieces: list[list[LibraryPiece]] = []
    rest: list[QueryRun] = []
    for run in runs:
        mine = list(_pieces(run, use)) if run.length >= use.rows and run.window_starts is None else []
        if mine:
            pieces.append(mine)
        taken = sum(span.length for piece in mine if not piece.causal for span in piece.spans)
        causal = run.causal and not any(piece.causal for piece in mine)
        left = tuple(clip_spans(run.spans, taken, run.tokens if causal or not run.causal else run.tokens - run.length))
        if left or not mine:
            rest.append(QueryRun(run.row, run.length, left, run.window_starts, causal))
    return pieces, rest


def _pieces(run: QueryRun, use: LibraryUse) -> list[LibraryPiece]:
    """The pieces of one run without window starts: from the first column on, and the diagonal."""
    common = run.tokens - (run.length if run.causal else 0)  # columns that every row sees
    found: list[LibraryPiece] = []
    start = 0
    while common - start >= use.columns:
        size = min(1 << ((common - start).bit_length() - 1), use.most_columns)
        spans = tuple(clip_spans(run.spans, start, start + size))
        if len(spans) > use.spans:
            break
        found.append(LibraryPiece(run.row, run.length, spans))
        start += size
    own = tuple(clip_spans(run.spans, common, run.tokens))
    if run.causal and run.length % use.row_multiple == 0 and len(own) <= use.spans:
        found.append(LibraryPiece(run.row, run.length, own, causal=True))
    return found


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
        pieces, rest = divide(runs, self._use)
        if not pieces:
            return self._inner.prepare(runs, rows)
        left = self._inner.prepare(rest, rows) if rest else None
        return _Runs(self._inner, self._product, self._use.row_multiple, rows, pieces, rest, left)

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> PreparedDiagonal:
        """See `Backend.prepare_diagonal`."""
        use = self._use
        large = [each for each in segments if each[1] >= use.rows and each[1] % use.row_multiple == 0]
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
    # as in `LibraryUse`
    row_multiple: int
    # query rows
    rows: int
    # for each run that has some, its pieces
    pieces: Sequence[Sequence[LibraryPiece]]
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
        whole = None if self.left is None else self.left.attend(q, kv, blocks, scale)
        seen = {run.row for run in self.rest}
        for mine in self.pieces:
            rows = mine[0].rows
            parts = [self._piece(piece, q[rows], kv, blocks, scale) for piece in mine]
            if whole is not None and rows.start in seen:
                parts.append(AttentionState(whole.out[rows], whole.lse[rows]))
            if mine[0].length == self.rows:
                return self.inner.merge(parts, dtype)
            if whole is None:
                whole = _empty(q, kv.width)
            merged = self.inner.merge(parts)
            whole.out[rows], whole.lse[rows] = merged.out, merged.lse
        return _empty(q, kv.width) if whole is None else whole

    def _piece(
        self, piece: LibraryPiece, q: Tensor, kv: CacheRows, blocks: Sequence[HeadBlock], scale: float
    ) -> AttentionState:
        """The state of one piece, of its rows q [T, Hq, D]."""
        values = kv.take(piece.spans).values
        if values.stride(1) * values.shape[1] >= _REACHABLE:
            values = values.contiguous()
        padding = -len(q) % self.row_multiple
        rows = F.pad(q, (0, 0, 0, 0, 0, padding)) if padding else q
        state = _call(self.product, rows, values[0], values[1], blocks, scale, piece.causal)
        return AttentionState(state.out[: len(q)], state.lse[: len(q)])


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


def _build(device: torch.device, shape: BackendShape) -> Backend:
    inner = triton.BACKEND.build(device, shape)
    if not isinstance(inner, RecordableBackend) or problem_of_library(device, shape):
        return inner
    return CudnnBackend(inner, cudnn_product)


# `auto` does not choose it: on first use cuDNN plans each shape, for 0.05 to 3.7 s on an H100, and nothing warms it up
BACKEND = AttentionBackend(
    "cudnn", devices=("cuda",), supports=_supports, build=_build, package="triton", automatic=False
)
