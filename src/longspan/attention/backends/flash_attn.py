"""Attention with the flash-attn library (version 2), on views of the page pool.

It owns how a run becomes one call, and the conversion of the result. The library's page tables need pages of a multiple
of 256 tokens, so they are not used: a run of one span is attended in place, and several spans are copied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

_WIDEST = 256  # most elements of a head
_EVERYTHING = (-1, -1)  # the library's window without limits


class FlashAttnBackend(PlainBackend):
    """One library call for each run. `TorchBackend` computes what the library cannot: window starts, MLA's widths.

    Tests pass a replacement of the package as `library`.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        super().__init__(device)
        self._library = library or import_module("flash_attn")
        self._plain = TorchBackend(device)

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> _Runs:
        """See `Backend.prepare`."""
        masked = [run for run in runs if run.window_starts is not None]
        return _Runs(self._library, runs, self._plain.prepare(runs, rows), self._plain.prepare(masked, rows))

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(self._library, segments, window, self._plain.prepare_diagonal(segments, rows, window))


@dataclass(frozen=True)
class _Runs:
    """See `PreparedRuns`."""

    # the imported package
    library: Any
    # the runs as they are
    runs: Sequence[QueryRun]
    # all runs, for shapes that the library cannot compute
    plain: PreparedRuns
    # the runs with window starts
    masked: PreparedRuns

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        if not _fits(q) or kv.scales is not None:
            return self.plain.attend(q, kv, blocks, scale)
        whole = self.masked.attend(q, kv, blocks, scale)
        for run in self.runs:
            if run.window_starts is not None or not run.tokens:
                continue
            rows = slice(run.row, run.row + run.length)
            within = kv.take(run.spans).values.transpose(1, 2)
            part = _call(self.library, q[rows], within[0], within[-1], blocks, softmax_scale=scale, causal=False)
            whole.out[rows], whole.lse[rows] = part.out, part.lse
        return whole


class _Diagonal(LibraryDiagonal):
    """See `PreparedDiagonal`."""

    def takes(self, q: Tensor, v: Tensor) -> bool:
        """See `LibraryDiagonal.takes`."""
        return _fits(q)

    def segment(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """See `SegmentedDiagonal.segment`."""
        sees = _EVERYTHING if self.window is None else (self.window - 1, 0)
        lacking = q.shape[-1] - v.shape[-1]
        wide = F.pad(v, (0, lacking)) if lacking else v  # padding by nothing would copy
        part = _call(self.library, q, k, wide, blocks, softmax_scale=scale, causal=True, window_size=sees)
        return part.columns(v.shape[-1])


def _call(library: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], **options: Any) -> AttentionState:
    """Call the library with one sequence: q [T, Hq, D], k and v [L, Hkv, D] → out [T, Hq, D].

    The library returns lse [1, Hq, T], as natural logarithms.
    """
    part = AttentionState.empty(q.shape[0], q.shape[1], v.shape[-1], q)
    for block in blocks:
        heads, held = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
        out, lse, _ = library.flash_attn_func(
            q[None, :, heads], k[None, :, held], v[None, :, held], return_attn_probs=True, **options
        )
        found = AttentionState.normalised(out[0].float(), lse[0].transpose(0, 1))
        part.out[:, heads], part.lse[:, heads] = found.out, found.lse
    return part


def _fits(q: Tensor) -> bool:
    """Whether the library has a kernel for queries of this dtype and width."""
    return q.element_size() == 2 and q.shape[-1] <= _WIDEST and q.shape[-1] % 8 == 0


def _supports(shape: BackendShape) -> str | None:
    """See `AttentionBackend.supports`."""
    problem = half_precision_problem(shape)
    if problem is None and shape.kv_factor == 1:
        problem = "cannot read a cache of latents"
    if problem is None and (shape.head_dim > _WIDEST or shape.head_dim % 8):
        problem = f"takes heads of up to {_WIDEST} elements, a multiple of 8, not {shape.head_dim}"
    return problem


BACKEND = AttentionBackend(
    "flash_attn",
    devices=("cuda",),
    supports=_supports,
    build=lambda device, shape: FlashAttnBackend(device),
    package="flash_attn",
    automatic=False,
)
