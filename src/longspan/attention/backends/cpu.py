"""Attention on a CPU through PyTorch's flash kernel, over views of the page pool.

It owns the packing of query heads and of short runs that this kernel wants; it must not know
about ranks, schedules or pages beyond the spans it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.attention.heads import HeadBlock
from longspan.attention.partial import Partial, merge
from longspan.cache.pages import Span
from longspan.view import QueryRun

_SHORT_SPAN = 512  # tokens; copying spans shorter than this on average beats one kernel call for each


class CpuBackend:
    """The flash kernel returns (out, natural lse) and reads strided keys, so pages are attended in place."""

    def causal(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> Partial:
        """See `Backend.causal`."""
        parts = [_causal_block(q, k, v, block, scale) for block in blocks]
        return _join_heads(parts)

    def unmasked(
        self, q: Tensor, runs: Sequence[QueryRun], kv: Tensor, blocks: Sequence[HeadBlock], scale: float
    ) -> Partial:
        """See `Backend.unmasked`."""
        if len(runs) == 1 and runs[0].length == q.shape[0]:
            return _run(q, runs[0].spans, kv, blocks, scale)
        whole = Partial.empty(q.shape[0], q.shape[1], kv.shape[-1], q)
        for run in runs:
            stop = run.row + run.length
            part = _run(q[run.row : stop], run.spans, kv, blocks, scale)
            whole.out[run.row : stop] = part.out
            whole.lse[run.row : stop] = part.lse
        return whole


def _run(q: Tensor, spans: Sequence[Span], kv: Tensor, blocks: Sequence[HeadBlock], scale: float) -> Partial:
    views = [kv[:, :, span.slot : span.slot + span.length] for span in spans]
    if len(views) > 1 and sum(span.length for span in spans) < _SHORT_SPAN * len(spans):
        views = [torch.cat(views, dim=2)]
    return merge([_join_heads([_dense_block(q, view, block, scale) for block in blocks]) for view in views])


def _dense_block(q: Tensor, kv: Tensor, block: HeadBlock, scale: float) -> Partial:
    """Pack the query heads of a KV head as rows of one head: q [T, H, D] → [1, Hkv, T·group, D]."""
    tokens, _, dim = q.shape
    heads = block.q_stop - block.q_start
    packed = q[:, block.q_start : block.q_stop].reshape(tokens, block.kv_heads, block.group, dim)
    if tokens > 1:
        packed = packed.transpose(0, 1).reshape(1, block.kv_heads, tokens * block.group, dim)
    keys, values = (kv[plane, None, block.kv_start : block.kv_stop] for plane in (0, -1))
    packed = _unit_stride(packed)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(packed, keys, values, scale=scale)
    if tokens == 1:  # nothing to put back in order: a decode step has many of these
        return Partial(out.reshape(1, heads, dim).to(lse.dtype), lse.reshape(1, heads))
    out = out.view(block.kv_heads, tokens, block.group, dim).transpose(0, 1)
    lse = lse.view(block.kv_heads, tokens, block.group).transpose(0, 1)
    return Partial(out.reshape(tokens, heads, dim).to(lse.dtype), lse.reshape(tokens, heads))


def _causal_block(q: Tensor, k: Tensor, v: Tensor, block: HeadBlock, scale: float) -> Partial:
    queries = _unit_stride(q)[None, :, block.q_start : block.q_stop].transpose(1, 2)
    keys = _unit_stride(k)[None, :, block.kv_start : block.kv_stop].transpose(1, 2)
    values = _unit_stride(_as_wide(v, q.shape[-1]))[None, :, block.kv_start : block.kv_stop].transpose(1, 2)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, is_causal=True, scale=scale
    )
    return Partial(out[0].transpose(0, 1).to(lse.dtype), lse[0].transpose(0, 1)).columns(v.shape[-1])


def _as_wide(v: Tensor, width: int) -> Tensor:
    """The kernel wants values as wide as queries: MLA's are narrower."""
    return v if v.shape[-1] == width else F.pad(v, (0, width - v.shape[-1]))


def _unit_stride(x: Tensor) -> Tensor:
    """The kernel takes any strides but for the last dimension's, which it reads as 1 unchecked."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _join_heads(parts: Sequence[Partial]) -> Partial:
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1))
