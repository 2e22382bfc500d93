"""Attention through the FlashInfer library, over the page pool in place.

It owns the page tables, with every slot as a page of one token: whatever the page size, our layout is then one of
the library's, by strides alone. It also owns the form of results: log base 2 becomes natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longspan.attention.backends.base import (
    AttentionBackend,
    BackendShape,
    PreparedDiagonal,
    PreparedRuns,
    half_precision_problem,
)
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.plain import PlainBackend
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.cache.pages import Span, clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

_WORKSPACE_BYTES = 128 << 20  # what the library asks for
_DIMS = (64, 128, 256)
_LATENT, _ROPE = 512, 64


class FlashInferBackend(PlainBackend):
    """Plans are made once for a step's runs and used by all layers; shapes the library lacks go to plain operations.

    `library` stands for the imported package, in tests.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        super().__init__(device)
        self._library = library or import_module("flashinfer")
        self._plain = TorchBackend(device)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> _Runs:
        """See `Backend.prepare`."""
        return _Runs(self._library, self._workspace, runs, self._plain.prepare(runs, rows))

    def prepare_diagonal(self, tokens: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(self._library, window, self._plain.prepare_diagonal(tokens, window))


class _Runs:
    def __init__(self, library: Any, workspace: Tensor, runs: Sequence[QueryRun], plain: PreparedRuns) -> None:
        self._library = library
        self._workspace = workspace
        self._runs = runs
        self._plain = plain
        self._wrappers: dict[tuple[object, ...], Any] = {}

    @cached_property
    def _table(self) -> _Table:
        return _table(self._runs, self._workspace.device)

    def attend(self, q: Tensor, kv: CacheRows, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
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
        key = (q.shape[1], block.kv_heads, kv.width, scale, q.dtype, kv.values.dtype)
        if key not in self._wrappers:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            wrapper.plan(
                table.row_starts, table.slot_starts, table.slots, torch.ones_like(table.counts),
                q.shape[1], block.kv_heads, kv.width, 1,
                causal=False, sm_scale=scale, q_data_type=q.dtype, kv_data_type=kv.values.dtype,
            )  # fmt: skip
            self._wrappers[key] = wrapper
        held = kv.values[:, block.kv_start : block.kv_stop].transpose(1, 2)[:, :, None]  # [kv_factor, slots, 1, Hkv, D]
        found: tuple[Tensor, Tensor] = self._wrappers[key].run(q, (held[0], held[1]), return_lse=True)
        return found

    def _latent(self, q: Tensor, table: _Table, kv: CacheRows, block: HeadBlock, scale: float) -> tuple[Tensor, Tensor]:
        key = (q.shape[1], scale, q.dtype, kv.values.dtype)
        if key not in self._wrappers:
            wrapper = self._library.mla.BatchMLAPagedAttentionWrapper(self._workspace)
            wrapper.plan(
                qo_indptr=table.row_starts, kv_indptr=table.slot_starts, kv_indices=table.slots,
                kv_len_arr=table.counts, num_heads=q.shape[1], head_dim_ckv=_LATENT, head_dim_kpe=_ROPE,
                page_size=1, causal=False, sm_scale=scale, q_data_type=q.dtype, kv_data_type=kv.values.dtype,
            )  # fmt: skip
            self._wrappers[key] = wrapper
        held = kv.values[0, block.kv_start][:, None]  # [slots, 1, D]
        found: tuple[Tensor, Tensor] = self._wrappers[key].run(
            q_nope=q[..., :_LATENT].contiguous(), q_pe=q[..., _LATENT:].contiguous(),
            ckv_cache=held[..., :_LATENT], kpe_cache=held[..., _LATENT:], return_lse=True,
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class _Diagonal:
    library: Any
    window: int | None
    plain: PreparedDiagonal

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, blocks: Sequence[HeadBlock], scale: float
    ) -> AttentionState:
        """See `PreparedDiagonal.attend`."""
        v = k if v is None else v
        if q.element_size() != 2 or q.shape[-1] not in _DIMS or v.shape[-1] != q.shape[-1]:
            return self.plain.attend(q, k, v, blocks, scale)
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
    """Rows of q [N] and the slots they see, in the library's form: starts [R + 1] and counts [R] of R runs, int32.

    Starts and counts stay on the host, where the library plans.
    """

    rows: Tensor
    row_starts: Tensor
    slots: Tensor
    slot_starts: Tensor
    counts: Tensor


def _table(runs: Sequence[QueryRun], device: torch.device) -> _Table:
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
    """Rows under a window become runs of one row: page tables can say what a mask would."""
    if run.window_starts is None:
        yield run
        return
    for number, low in enumerate(run.window_starts):
        spans: tuple[Span, ...] = tuple(clip_spans(run.spans, low, run.tokens))
        yield QueryRun(run.row + number, 1, spans)


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def _is_plain(kv: CacheRows) -> bool:
    return len(kv.values) == 2 and kv.width in _DIMS


def _natural(out: Tensor, lse: Tensor) -> AttentionState:
    """The library's logarithms are to base 2."""
    return AttentionState.normalised(out.float(), lse.float() * math.log(2))


def _supports(shape: BackendShape) -> str | None:
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
