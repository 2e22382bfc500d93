"""The slow twin: attention written as its definition, any dtype, for tests.

It owns nothing but the formula; it must not be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.backends.plain import PlainBackend
from longspan.attention.partial import Partial
from longspan.attention.rows import CacheRows
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun


class ReferenceBackend(PlainBackend):
    """softmax(q kᵀ · scale) v, one head after the other."""

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
        mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        return _attend(q, k.transpose(0, 1), v.transpose(0, 1), blocks, scale, mask)

    def attend(
        self, q: Tensor, runs: Sequence[QueryRun], kv: CacheRows, blocks: Sequence[HeadBlock], scale: float
    ) -> Partial:
        """See `Backend.attend`."""
        whole = Partial.empty(q.shape[0], q.shape[1], kv.width, q)
        values = kv.read(q.dtype)
        for run in runs:
            slots = [slot for span in run.spans for slot in range(span.slot, span.slot + span.length)]
            rows = slice(run.row, run.row + run.length)
            lows = torch.tensor(run.lows or (0,) * run.length)
            mask = torch.arange(len(slots)) >= lows[:, None]
            part = _attend(q[rows], values[0][:, slots], values[-1][:, slots], blocks, scale, mask)
            whole.out[rows], whole.lse[rows] = part.out, part.lse
        return whole


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float, mask: Tensor) -> Partial:
    part = Partial.empty(q.shape[0], q.shape[1], v.shape[-1], q)
    for block in blocks:
        for head in range(block.q_start, block.q_stop):
            kv_head = block.kv_start + (head - block.q_start) // block.group
            scores = (q[:, head] @ k[kv_head].T * scale).masked_fill(~mask, float("-inf"))
            part.lse[:, head] = torch.logsumexp(scores, -1)
            part.out[:, head] = torch.nan_to_num(torch.softmax(scores, -1)) @ v[kv_head]
    return part
