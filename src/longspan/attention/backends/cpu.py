"""Attention on a CPU with PyTorch's flash kernel, on views of the page pool.

It owns how query heads, short spans and short contexts are packed for this kernel; it must not know about ranks or
schedules, nor of pages more than the spans of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.attention.backends.base import AttentionBackend, PreparedRuns
from longspan.attention.backends.batch import Batch, batches
from longspan.attention.backends.plain import PlainBackend, SegmentedDiagonal
from longspan.attention.rows import CacheRows, unit_stride
from longspan.attention.state import AttentionState, concatenate, merge
from longspan.cache.pages import clip_spans
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

_SHORT_SPAN = 512  # tokens; spans that are shorter on average are copied together, to save kernel calls
_READ_TOKENS = 4096  # most quantised rows that are dequantised at once
_BAND_ROWS = 256  # most rows of a diagonal with a window that share a mask
# (q, k, v [B, H, T, D], additive mask) → (out [B, H, T, D], natural lse [B, H, T] fp32)
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CpuBackend(PlainBackend):
    """Attends to pages in place: the flash kernel reads keys and values that are strided views of the pool."""

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> PreparedRuns:
        """See `Backend.prepare`."""
        return _Runs(runs)

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> _Diagonal:
        """See `Backend.prepare_diagonal`."""
        return _Diagonal(segments, window)


class _Runs:
    """See `PreparedRuns`."""

    def __init__(self, runs: Sequence[QueryRun]) -> None:
        self._runs = runs

    @cached_property
    def _batched(self) -> tuple[Sequence[Batch], Sequence[QueryRun]]:
        """(batches, runs in none of them), computed in the first layer."""
        return batches(self._runs)

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        runs = self._runs
        # the result of a run over all rows needs no copy into a whole
        if len(runs) == 1 and runs[0].length == q.shape[0]:
            return _run(q, runs[0], kv, blocks, scale)
        whole = AttentionState.empty(q.shape[0], q.shape[1], kv.width, q)
        together, alone = self._batched if kv.is_whole else ((), runs)
        for batch in together:
            part = _join_heads([_batch_block(q[batch.rows], batch, kv, block, scale) for block in blocks])
            whole.out[batch.rows] = part.out
            whole.lse[batch.rows] = part.lse
        for run in alone:
            stop = run.row + run.length
            part = _run(q[run.row : stop], run, kv, blocks, scale)
            whole.out[run.row : stop] = part.out
            whole.lse[run.row : stop] = part.lse
        return whole


class _Diagonal(SegmentedDiagonal):
    """See `PreparedDiagonal`."""

    def __init__(self, segments: Sequence[tuple[int, int]], window: int | None) -> None:
        super().__init__(segments)
        self.window = window  # tokens that a row sees, its own included; None for all

    def segment(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
        """See `SegmentedDiagonal.segment`."""
        window = self.window
        if window is None or q.shape[0] <= window:
            return _join_heads([_causal_block(q, k, v, block, scale) for block in blocks])
        parts: list[AttentionState] = []
        for start in range(0, q.shape[0], _BAND_ROWS):
            stop = min(start + _BAND_ROWS, q.shape[0])
            first = max(0, start + 1 - window)
            band = _band(stop - start, stop - first, start - first, window, q)
            keys, values = k[first:stop], v[first:stop]
            parts.append(_join_heads([_causal_block(q[start:stop], keys, values, b, scale, band) for b in blocks]))
        return concatenate(parts)


def _run(q: Tensor, run: QueryRun, kv: CacheRows, blocks: Sequence[HeadBlock], scale: float) -> AttentionState:
    """Attention of one run's rows q [T, Hq, D]."""
    spans = run.spans
    if run.window_starts is not None:
        within = kv.take(spans).read(q.dtype)
        seen = torch.arange(run.tokens) >= torch.tensor(run.window_starts)[:, None]
        part = _join_heads([_dense_block(q, within, block, scale, _additive(seen, q)) for block in blocks])
        # the kernel returns no usable lse for rows whose keys are all masked
        return AttentionState.normalised(part.out, part.lse.masked_fill(~seen.any(-1, keepdim=True), float("-inf")))
    if kv.scales is not None:  # dequantise a bounded number of rows at a time
        cut = range(0, run.tokens, _READ_TOKENS)
        views = [kv.take(clip_spans(spans, at, at + _READ_TOKENS)).read(q.dtype) for at in cut]
    elif len(spans) > 1 and run.tokens < _SHORT_SPAN * len(spans):
        views = [kv.take(spans).values]
    else:
        views = [kv.at(span).values for span in spans]
    return merge([_join_heads([_dense_block(q, view, block, scale) for block in blocks]) for view in views])


def _dense_block(q: Tensor, kv: Tensor, block: HeadBlock, scale: float, mask: Tensor | None = None) -> AttentionState:
    """Attention of the heads of one block, without causality: q [T, Hq, D], kv [kv_factor, Hkv, L, D], mask [T, L].

    The query heads of a KV head are packed as rows of one head: [1, Hkv, T · group, D].
    """
    tokens, _, dim = q.shape
    heads = block.q_stop - block.q_start
    packed = q[:, block.q_start : block.q_stop].reshape(tokens, block.kv_heads, block.group, dim)
    if tokens > 1:
        packed = packed.transpose(0, 1).reshape(1, block.kv_heads, tokens * block.group, dim)
    keys, values = (kv[plane, None, block.kv_start : block.kv_stop] for plane in (0, -1))
    packed = unit_stride(packed)
    if mask is not None:
        mask = mask.repeat_interleave(block.group, dim=0)
    out, lse = _FLASH(packed, keys, values, attn_mask=mask, scale=scale)
    if tokens == 1:  # rows and heads are in order already; decode steps make many such calls
        return AttentionState(out.reshape(1, heads, dim).to(lse.dtype), lse.reshape(1, heads))
    out = out.view(block.kv_heads, tokens, block.group, dim).transpose(0, 1)
    lse = lse.view(block.kv_heads, tokens, block.group).transpose(0, 1)
    return AttentionState(out.reshape(tokens, heads, dim).to(lse.dtype), lse.reshape(tokens, heads))


def _batch_block(q: Tensor, batch: Batch, kv: CacheRows, block: HeadBlock, scale: float) -> AttentionState:
    """Attention of the heads of one block for a batch: q [B, Hq, D], one token of each query.

    The slots of all contexts are copied to keys and values [B, Hkv, L, D].
    """
    count, _, dim = q.shape
    heads, (kv_factor, kv_heads, slots, _) = block.q_stop - block.q_start, kv.values.shape
    first = torch.arange(block.kv_start, block.kv_stop)
    firsts = torch.tensor([0, kv_factor - 1]) * kv_heads
    places = (firsts[:, None] + first)[..., None] * slots + batch.slots.reshape(-1)
    copied = kv.select(places.reshape(-1), q.dtype)
    keys, values = copied.view(2, len(first), count, -1, dim).transpose(1, 2)
    packed = q[:, block.q_start : block.q_stop].reshape(count, block.kv_heads, block.group, dim)
    mask = _additive(batch.seen, q)[:, None, None].expand(count, block.kv_heads, block.group, -1)
    out, lse = _FLASH(packed, keys, values, attn_mask=mask, scale=scale)
    return AttentionState(out.reshape(count, heads, dim).to(lse.dtype), lse.reshape(count, heads))


def _causal_block(
    q: Tensor, k: Tensor, v: Tensor, block: HeadBlock, scale: float, band: Tensor | None = None
) -> AttentionState:
    """Attention of the heads of one block to new tokens: q [T, Hq, D], k [L, Hkv, D], v [L, Hkv, Dv].

    Causal without `band`; else `band` [T, L] is the additive mask.
    """
    queries = unit_stride(q)[None, :, block.q_start : block.q_stop].transpose(1, 2)
    keys = unit_stride(k)[None, :, block.kv_start : block.kv_stop].transpose(1, 2)
    values = unit_stride(_as_wide(v, q.shape[-1]))[None, :, block.kv_start : block.kv_stop].transpose(1, 2)
    out, lse = _FLASH(queries, keys, values, is_causal=band is None, attn_mask=band, scale=scale)
    return AttentionState(out[0].transpose(0, 1).to(lse.dtype), lse[0].transpose(0, 1)).columns(v.shape[-1])


def _band(rows: int, keys: int, offset: int, window: int, like: Tensor) -> Tensor:
    """The additive mask [rows, keys] of a window: row i sees `window` keys, of which the last is number offset + i."""
    distance = torch.arange(offset, offset + rows)[:, None] - torch.arange(keys)
    return _additive((distance >= 0) & (distance < window), like)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    """The kernel's additive mask, of the dtype of `like`: 0 where `seen`, else -inf."""
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))


def _as_wide(v: Tensor, width: int) -> Tensor:
    """v padded with zeros to `width`, because the kernel needs values as wide as queries. MLA's are narrower."""
    return v if v.shape[-1] == width else F.pad(v, (0, width - v.shape[-1]))


def _join_heads(parts: Sequence[AttentionState]) -> AttentionState:
    """Concatenate states along heads."""
    if len(parts) == 1:
        return parts[0]
    return AttentionState(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1))


BACKEND = AttentionBackend(
    "cpu",
    devices=("cpu",),
    supports=lambda shape: None,
    build=lambda device, shape: CpuBackend(),
)
