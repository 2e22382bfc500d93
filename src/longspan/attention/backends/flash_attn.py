"""Attention through the flash-attn library (version 2): dense kernels over views of the page pool.

It owns how a run becomes one call and the form of its result. The library's own page tables want pages of 256 tokens,
which ours need not have: spans are attended where they lie, and a run of several is copied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.plain import PlainBackend
from longspan.attention.partial import Partial
from longspan.attention.rows import CacheRows
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

    def causal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        window: int | None = None,
    ) -> Partial:
        """See `Backend.causal`."""
        v = k if v is None else v
        if not _fits(q):
            return self._plain.causal(q, k, v, blocks, scale, window)
        sees = _EVERYTHING if window is None else (window - 1, 0)
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        return self._call(q, k, wide, blocks, softmax_scale=scale, causal=True, window_size=sees).columns(v.shape[-1])

    def attend(
        self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, blocks: Sequence[HeadBlock], scale: float
    ) -> Partial:
        """See `Backend.attend`."""
        if not _fits(q) or kv.scales is not None:
            return self._plain.attend(q, runs, kv, blocks, scale)
        whole = self._plain.attend(q, [run for run in runs if run.lows is not None], kv, blocks, scale)
        for run in runs:
            if run.lows is not None or not run.tokens:
                continue
            rows = slice(run.row, run.row + run.length)
            within = kv.take(run.spans).values.transpose(1, 2)
            part = self._call(q[rows], within[0], within[-1], blocks, softmax_scale=scale, causal=False)
            whole.out[rows], whole.lse[rows] = part.out, part.lse
        return whole

    def _call(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], **options: Any) -> Partial:
        """q, k, v [T, H, D] of one sequence; the library returns lse [1, H, T]."""
        part = Partial.empty(q.shape[0], q.shape[1], v.shape[-1], q)
        for block in blocks:
            heads, held = slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)
            out, lse, _ = self._library.flash_attn_func(
                q[None, :, heads], k[None, :, held], v[None, :, held], return_attn_probs=True, **options
            )
            found = Partial.normalised(out[0].float(), lse[0].transpose(0, 1))
            part.out[:, heads], part.lse[:, heads] = found.out, found.lse
        return part


def _fits(q: Tensor) -> bool:
    return q.element_size() == 2 and q.shape[-1] <= _WIDEST and q.shape[-1] % 8 == 0
