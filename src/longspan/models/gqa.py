"""Grouped-query attention of one layer: projections, q/k norm, rope.

It owns the projections between hidden states and heads; attention itself is passed in by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.models.config import ModelConfig
from longspan.models.context import Attend, LayerContext
from longspan.models.layers import PartialSum
from longspan.models.ops.base import RopeTable
from longspan.models.params import Param


class GroupedQueryAttention:
    """The attention of one layer, on the heads that its loader gives."""

    def __init__(
        self, config: ModelConfig, layer: int, prefix: str, context: LayerContext, width: int | None = None
    ) -> None:
        """`width` is that of the input, if it is not that of the hidden states."""
        load, linear, extent = context.loader.load, context.loader.linear, context.loader.extent
        hidden, dim, q_heads, kv_heads = config.hidden_size, config.head_dim, config.num_q_heads, config.num_kv_heads
        qkv = (("q", q_heads, "q_heads"), ("k", kv_heads, "kv_heads"), ("v", kv_heads, "kv_heads"))
        self._tp = context.tp
        self._ops = context.ops
        self._dim = dim
        self._qkv = linear(
            *(
                Param(f"{prefix}.{n}_proj.weight", (heads * dim, width or hidden), (axis, None), dim)
                for n, heads, axis in qkv
            )
        )
        self._o = linear(Param(f"{prefix}.o_proj.weight", (hidden, q_heads * dim), (None, "q_heads"), dim))
        self._qkv_bias: Tensor | None = None
        self._o_bias: Tensor | None = None
        self._norms: tuple[Tensor, ...] = ()
        self._eps = config.rms_norm_eps
        sink: Tensor | None = None
        if config.attention_bias:
            self._qkv_bias = load(
                *(Param(f"{prefix}.{n}_proj.bias", (heads * dim,), (axis,), dim) for n, heads, axis in qkv)
            )
        if config.attention_output_bias:
            self._o_bias = load(Param(f"{prefix}.o_proj.bias", (hidden,), (None,)))
        if config.qk_norm:
            self._norms = tuple(load(Param(f"{prefix}.{n}_norm.weight", (dim,), (None,))) for n in ("q", "k"))
        if config.attention_sinks:
            sink = load(Param(f"{prefix}.sinks", (q_heads,), ("q_heads",), exact=True))
        self._layer = AttentionLayer(layer, config.window(layer), sink)
        (q_start, q_stop), (kv_start, kv_stop) = extent("q_heads", q_heads), extent("kv_heads", kv_heads)
        self._q_heads, self._kv_heads = q_stop - q_start, kv_stop - kv_start

    def __call__(self, x: Tensor, table: RopeTable, attend: Attend) -> PartialSum:
        """x [T, width] → [T, hidden]."""
        # [T, Hq + 2 · Hkv, D]: queries, keys, values. Without a norm q and k are rotated as one tensor
        heads = self._qkv(x, self._qkv_bias).view(x.shape[0], self._q_heads + 2 * self._kv_heads, self._dim)
        q, k, v = torch.split(heads, [self._q_heads, self._kv_heads, self._kv_heads], dim=1)
        rotated = (q, k) if self._norms else (heads[:, : -self._kv_heads],)
        self._ops.rope(rotated, table, self._norms, self._eps)
        out = attend(self._layer, q, k, v).reshape(x.shape[0], self._q_heads * self._dim)
        return PartialSum(self._tp, self._o(out), self._o_bias)
