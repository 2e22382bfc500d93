"""Long prefills by cuDNN's attention, through PyTorch; all other work by the Triton backend.

It owns which parts of a step are large enough for a call of the library, and the call. cuDNN plans once for each shape,
so calls have few sizes, of rows and of columns, and warm-up runs all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
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
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.attention.step_buffer import StepBuffer
from longspan.cache.pages import Span, clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun

_LOG = logging.getLogger("longspan.engine")
_CAPABILITY = 8  # Ampere; the library has no such kernels for older GPUs
_WIDEST = 128  # most elements of a head
_ALIGNMENT = 8  # elements of 16 bits in 16 bytes, of which a head must be a multiple
_REACHABLE = 2**31  # elements that a call may have to step over between its first and its last
_LEAST_NEW = 0.75  # of the rows of a block that begins within the one before
_FASTER = 9  # the generation on which the library was measured to be faster: Hopper
_MERGED = 4  # most parts of one merge: its kernel is compiled for each number of parts
_TOLERANCE = 0.02  # largest error of the trial call, relative to the largest element of the expected result
Product = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(q [1, Hq, T, D], k and v [1, Hkv, S, D], causal, scale) → (out [1, Hq, T, D], natural lse of Hq · T elements).

With `causal` T and S are equal, and a row sees the keys up to its own.
"""


@dataclass(frozen=True)
class LibraryUse:
    """The sizes of calls of the library. They are few, because it plans each of them, for 0.05 to 3.7 s on an H100."""

    # rows of a call, ascending
    rows: tuple[int, ...] = (2048, 4096, 8192)
    # columns of a call that all rows see, ascending; fewer do not pay, as its result is written and merged
    columns: tuple[int, ...] = (8192, 32768, 131072)
    # most spans of a piece: several are copied together, one after the other
    spans: int = 64

    @property
    def steps(self) -> tuple[tuple[int, int, bool], ...]:
        """See `AttentionBackend.long_steps`: steps that take all sizes, and merge all numbers of parts."""
        adjacent = [(rows, columns, False) for rows in self.rows for columns in self.columns]
        merged = [(self.rows[0], count * self.columns[0], False) for count in range(2, _MERGED)]
        return (*adjacent, *merged, *((rows, self.columns[0], True) for rows in self.rows))


@dataclass(frozen=True)
class LibraryPiece:
    """Columns for one call: all rows of its block see all of them, or with `causal` those up to their own."""

    # the columns
    spans: tuple[Span, ...]
    # whether the columns are the rows' own tokens
    causal: bool = False


@dataclass(frozen=True)
class LibraryBlock:
    """Rows [row, row + length) of one run for the library, as many as a call has."""

    # first row
    row: int
    # number of rows
    length: int
    # first row whose result is used: those before it are in the block before
    first: int
    # what they see by calls of the library
    pieces: tuple[LibraryPiece, ...]

    @property
    def used(self) -> slice:
        """The rows whose results are used."""
        return slice(self.first, self.row + self.length)


def divide(runs: Sequence[QueryRun], use: LibraryUse) -> tuple[list[LibraryBlock], list[QueryRun]]:
    """(the blocks of rows for the library, the runs over everything else). No row is in two of the runs."""
    blocks: list[LibraryBlock] = []
    rest: list[QueryRun] = []
    for run in runs:
        mine = list(_blocks_of(run, use)) if run.window_starts is None else []
        if not any(block.pieces for block in mine):
            rest.append(run)
            continue
        for block in mine:
            blocks += [block] if block.pieces else []
            rest += _left_of(run, block)
        stop = mine[-1].row + mine[-1].length
        if stop < run.row + run.length:
            rest.append(QueryRun(stop, run.row + run.length - stop, run.spans, None, run.causal))
    return blocks, rest


def _left_of(run: QueryRun, block: LibraryBlock) -> Iterator[QueryRun]:
    """What the rows of a block see beside its pieces."""
    taken = sum(span.length for piece in block.pieces if not piece.causal for span in piece.spans)
    causal = run.causal and not any(piece.causal for piece in block.pieces)
    stop = run.tokens
    if run.causal:  # up to the tokens of the block, or to those of its last row
        stop += block.row - run.row - run.length + (block.length if causal else 0)
    spans = tuple(clip_spans(run.spans, taken, stop))
    if spans or not block.pieces:
        yield QueryRun(block.first, block.row + block.length - block.first, spans, None, causal)


def _blocks_of(run: QueryRun, use: LibraryUse) -> Iterator[LibraryBlock]:
    """The blocks of a run without window starts, with their pieces."""
    for start, length, first in row_blocks(run.length, use.rows):
        common = run.tokens - (run.length - start if run.causal else 0)  # columns that every row sees
        pieces: list[LibraryPiece] = []
        at = 0
        while (size := max((size for size in use.columns if size <= common - at), default=0)) > 0:
            spans = tuple(clip_spans(run.spans, at, at + size))
            if len(spans) > 1:  # they are copied: only a few columns at a time
                size = use.columns[0]
                spans = tuple(clip_spans(run.spans, at, at + size))
            if len(spans) > use.spans:
                break
            pieces.append(LibraryPiece(spans))
            at += size
        own = tuple(clip_spans(run.spans, common, common + length)) if run.causal else ()
        if 0 < len(own) <= use.spans:
            pieces.append(LibraryPiece(own, causal=True))
        yield LibraryBlock(run.row + start, length, run.row + first, tuple(pieces))


def row_blocks(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, number of rows, first row that is not in a block before) of blocks of some of `sizes`, ascending.

    The last one may begin before the end of the one before, so that no row is padded; rows for which that does not pay
    are in none.
    """
    at = 0
    while (size := max((size for size in sizes if size <= rows - at), default=0)) > 0:
        yield at, size, at
        at += size
    left = rows - at
    size = next((size for size in sizes if left < size <= rows), 0)
    if left and left >= size * _LEAST_NEW > 0:
        yield rows - size, size, at


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
        while len(parts) > _MERGED:  # merged ones go to the end: each part is rounded in few merges
            parts = [*parts[_MERGED:], self.inner.merge(parts[:_MERGED], q.dtype)]
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
