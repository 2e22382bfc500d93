"""Attention through the flash-attn library (version 2): dense kernels over views of the page pool.

It owns how a run becomes one call and the form of its result. The library's own page tables want pages of 256 tokens,
which ours need not have: spans are attended where they lie, and a run of several is copied together.
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
    PreparedDiagonal,
    PreparedRuns,
    half_precision_problem,
)
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.plain import PlainBackend
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

_WIDEST = 256
_EVERYTHING = (-1, -1)


class FlashAttnBackend(PlainBackend):
    """One call for each run; what the library cannot do (masks by row, MLA's widths) plain operations do.

    `library` stands for the imported package, in tests.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        super().__init__(device)
        self._library = library or import_module("flash_attn")
        self._plain = TorchBackend(device)

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> _Runs:
        """See `Backend.prepare`."""
        masked = [run for run in runs if run.window_starts is not None]
        return _Runs(self._library, runs, self._plain.prepare(runs, rows), self._plain.prepare(masked, rows))

    def prepare_diagonal(self, tokens: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(self._library, window, self._plain.prepare_diagonal(tokens, window))


@dataclass(frozen=True)
class _Runs:
    library: Any
    runs: Sequence[QueryRun]
    # all of them, and those with a mask, by plain operations
    plain: PreparedRuns
    masked: PreparedRuns

    def attend(self, q: Tensor, kv: CacheRows, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
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
        if not _fits(q):
            return self.plain.attend(q, k, v, blocks, scale)
        sees = _EVERYTHING if self.window is None else (self.window - 1, 0)
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        part = _call(self.library, q, k, wide, blocks, softmax_scale=scale, causal=True, window_size=sees)
        return part.columns(v.shape[-1])


def _call(library: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], **options: Any) -> AttentionState:
    """q, k, v [T, H, D] of one sequence; the library returns lse [1, H, T]."""
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
    return q.element_size() == 2 and q.shape[-1] <= _WIDEST and q.shape[-1] % 8 == 0


def _supports(shape: BackendShape) -> str | None:
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
