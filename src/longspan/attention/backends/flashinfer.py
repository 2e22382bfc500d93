"""Attention with the FlashInfer library, on the page pool in place.

It owns the library's page tables, and the conversion of its base-2 logarithms. Every slot is a page of one token for
the library. With these the pool of any page size is a layout that the library accepts, without a copy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from longspan.attention.backends.base import (
    AttentionBackend,
    BackendShape,
    PreparedRuns,
    half_precision_problem,
)
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.plain import LibraryDiagonal, PlainBackend
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.cache.pages import Span, clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

_WORKSPACE_BYTES = 128 << 20  # as the library recommends
_DIMS = (64, 128, 256)  # elements of a head that the library supports
_LATENT, _ROPE = 512, 64  # elements of a latent and of a rotary key that it supports


class FlashInferBackend(PlainBackend):
    """The library's plans are made once in a step and used by all layers. `TorchBackend` computes other shapes.

    Tests pass a replacement of the package as `library`.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        super().__init__(device)
        self._library = library or import_module("flashinfer")
        self._plain = TorchBackend(device)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers = _Wrappers(self._library, self._workspace)

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> _Runs:
        """See `Backend.prepare`."""
        return _Runs(self._wrappers, self._workspace.device, runs, self._plain.prepare(runs, rows))

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(self._library, segments, window, self._plain.prepare_diagonal(segments, rows, window))


class _Wrappers:
    """The library's wrappers, which are planned again in later steps: each holds 8 MB on the device and on the host.

    A plan is copied from the wrapper's pinned memory while the host goes on, so a wrapper is not planned again before
    the device has done all that was in its stream when the wrapper came back.
    """

    def __init__(self, library: Any, workspace: Tensor) -> None:
        self._library = library
        self._workspace = workspace  # uint8, shared by all calls of the library
        # (wrapper, event after its last use; None without a CUDA device), by whether it is for latents; oldest first
        self._back: dict[bool, deque[tuple[Any, torch.cuda.Event | None]]] = {False: deque(), True: deque()}

    def lend(self, owner: object, *, latent: bool) -> Any:
        """A wrapper for paged keys and values, or for latents, until `owner` is deleted."""
        back = self._back[latent]
        if back and (back[0][1] is None or back[0][1].query()):  # type: ignore[no-untyped-call]
            wrapper, _ = back.popleft()
        elif latent:
            wrapper = self._library.mla.BatchMLAPagedAttentionWrapper(self._workspace)
        else:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        finalize(owner, self._take_back, wrapper, latent).atexit = False
        return wrapper

    def _take_back(self, wrapper: Any, latent: bool) -> None:
        event = torch.cuda.Event() if self._workspace.is_cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record(torch.cuda.current_stream(self._workspace.device))
        self._back[latent].append((wrapper, event))


class _Runs:
    """See `PreparedRuns`."""

    def __init__(
        self, wrappers: _Wrappers, device: torch.device, runs: Sequence[QueryRun], plain: PreparedRuns
    ) -> None:
        self._wrappers = wrappers
        self._device = device
        self._runs = runs
        self._plain = plain  # for shapes that the library cannot compute
        # wrappers with a plan, by the sizes that a plan depends on
        self._planned: dict[tuple[object, ...], Any] = {}

    @cached_property
    def _table(self) -> _Table:
        """The page table of all runs, made in the first layer."""
        return _table(self._runs, self._device)

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        latent = len(kv.values) == 1 and kv.width == _LATENT + _ROPE
        if kv.scales is not None or q.element_size() != 2 or not (latent or _is_plain(kv)):
            return self._plain.attend(q, kv, blocks, scale)
        whole, table = AttentionState.empty(q.shape[0], q.shape[1], _LATENT if latent else kv.width, q), self._table
        if not len(table.rows):
            return whole
        for block in blocks:
            heads = slice(block.q_start, block.q_stop)
            queries = q[:, heads][table.rows]
            call = self._latent if latent else self._paged
            part = _natural(*call(queries, table, kv, block, scale))
            whole.out[table.rows, heads], whole.lse[table.rows, heads] = part.out, part.lse
        return whole

    def _paged(self, q: Tensor, table: _Table, kv: CacheRows, block: HeadBlock, scale: float) -> tuple[Tensor, Tensor]:
        """(out [R, H, D], base-2 lse [R, H]) of q [R, H, D], the table's rows and one block's heads."""
        key = (q.shape[1], block.kv_heads, kv.width, scale, q.dtype, kv.values.dtype)
        if key not in self._planned:
            wrapper = self._wrappers.lend(self, latent=False)
            wrapper.plan(
                table.row_starts, table.slot_starts, table.slots, torch.ones_like(table.counts),
                q.shape[1], block.kv_heads, kv.width, 1,
                causal=False, sm_scale=scale, q_data_type=q.dtype, kv_data_type=kv.values.dtype,
            )  # fmt: skip
            self._planned[key] = wrapper
        held = kv.values[:, block.kv_start : block.kv_stop].transpose(1, 2)[:, :, None]  # [kv_factor, S, 1, Hkv, D]
        found: tuple[Tensor, Tensor] = self._planned[key].run(q, (held[0], held[1]), return_lse=True)
        return found

    def _latent(self, q: Tensor, table: _Table, kv: CacheRows, block: HeadBlock, scale: float) -> tuple[Tensor, Tensor]:
        """The same for latents: out is [R, H, latent]."""
        key = (q.shape[1], scale, q.dtype, kv.values.dtype)
        if key not in self._planned:
            wrapper = self._wrappers.lend(self, latent=True)
            wrapper.plan(
                qo_indptr=table.row_starts, kv_indptr=table.slot_starts, kv_indices=table.slots,
                kv_len_arr=table.counts, num_heads=q.shape[1], head_dim_ckv=_LATENT, head_dim_kpe=_ROPE,
                page_size=1, causal=False, sm_scale=scale, q_data_type=q.dtype, kv_data_type=kv.values.dtype,
            )  # fmt: skip
            self._planned[key] = wrapper
        held = kv.values[0, block.kv_start][:, None]  # [S, 1, D]
        found: tuple[Tensor, Tensor] = self._planned[key].run(
            q_nope=q[..., :_LATENT].contiguous(), q_pe=q[..., _LATENT:].contiguous(),
            ckv_cache=held[..., :_LATENT], kpe_cache=held[..., _LATENT:], return_lse=True,
        )  # fmt: skip
        return found


class _Diagonal(LibraryDiagonal):
    """See `PreparedDiagonal`."""

    def takes(self, q: Tensor, v: Tensor) -> bool:
        """See `LibraryDiagonal.takes`."""
        return q.element_size() == 2 and q.shape[-1] in _DIMS and v.shape[-1] == q.shape[-1]

    def segment(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """See `SegmentedDiagonal.segment`."""
        whole = AttentionState.empty(q.shape[0], q.shape[1], v.shape[-1], q)
        left = -1 if self.window is None else self.window - 1
        for block in blocks:
            heads, held = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
            keys, values = k[:, held].contiguous(), v[:, held].contiguous()
            out, lse = self.library.single_prefill_with_kv_cache(
                q[:, heads].contiguous(), keys, values,
                causal=True, kv_layout="NHD", sm_scale=scale, window_left=left, return_lse=True,
            )  # fmt: skip
            part = _natural(out, lse)
            whole.out[:, heads], whole.lse[:, heads] = part.out, part.lse
        return whole


@dataclass(frozen=True, eq=False)
class _Table:
    """The page table of n runs in the library's format. Starts and counts stay on the host, where the library plans."""

    # [R] int64 on the device: rows of q that are in some run, run by run
    rows: Tensor
    # [n + 1] int32: index in `rows` at which each run starts, and the end
    row_starts: Tensor
    # int32 on the device: slots that each run sees, run by run
    slots: Tensor
    # [n + 1] int32: index in `slots` at which each run starts, and the end
    slot_starts: Tensor
    # [n] int32: number of slots of each run
    counts: Tensor


def _table(runs: Sequence[QueryRun], device: torch.device) -> _Table:
    """The page table of those runs that see any slot."""
    seeing = [run for given in runs for run in _without_mask(given) if run.tokens]
    rows = [torch.arange(run.row, run.row + run.length) for run in seeing]
    slots = [torch.arange(s.slot, s.slot + s.length, dtype=torch.int32) for run in seeing for s in run.spans]
    counts = torch.tensor([run.tokens for run in seeing], dtype=torch.int32)
    return _Table(
        torch.cat(rows or [torch.arange(0)]).to(device),
        _starts(torch.tensor([run.length for run in seeing], dtype=torch.int32)),
        torch.cat(slots or [torch.arange(0, dtype=torch.int32)]).to(device),
        _starts(counts),
        counts,
    )


def _without_mask(run: QueryRun) -> Iterator[QueryRun]:
    """The run itself, or if it has window starts a run for each of its rows, over the slots that this row sees."""
    if run.window_starts is None:
        yield run
        return
    for number, low in enumerate(run.window_starts):
        spans: tuple[Span, ...] = tuple(clip_spans(run.spans, low, run.tokens))
        yield QueryRun(run.row + number, 1, spans)


def _starts(lengths: Tensor) -> Tensor:
    """lengths [n] → [n + 1]: where each of n adjacent runs starts, and the end."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def _is_plain(kv: CacheRows) -> bool:
    """Whether rows are keys and values of a width that the library supports."""
    return len(kv.values) == 2 and kv.width in _DIMS


def _natural(out: Tensor, lse: Tensor) -> AttentionState:
    """The state from the library's out and lse, whose logarithms are to base 2."""
    return AttentionState.normalised(out.float(), lse.float() * math.log(2))


def _supports(shape: BackendShape) -> str | None:
    """See `AttentionBackend.supports`."""
    problem = half_precision_problem(shape)
    if problem is not None:
        return problem
    if shape.kv_factor == 1:
        fits = (shape.head_dim, shape.value_dim) == (_LATENT + _ROPE, _LATENT)
        return None if fits else f"takes latents of {_LATENT + _ROPE} elements with {_LATENT} of values"
    if shape.head_dim not in _DIMS:
        return f"takes heads of {', '.join(map(str, _DIMS))} elements, not {shape.head_dim}"
    return None


BACKEND = AttentionBackend(
    "flashinfer",
    devices=("cuda",),
    supports=_supports,
    build=lambda device, shape: FlashInferBackend(device),
    package="flashinfer",
    automatic=False,
)
