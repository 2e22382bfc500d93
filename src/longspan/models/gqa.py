"""Grouped-query attention of one layer: projections, q/k norm, rope.

It owns the way from hidden states to q, k, v and back; attention itself is handed in.
"""

from __future__ import annotations

from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.models.config import ModelConfig
from longspan.models.context import Attend, LayerContext
from longspan.models.layers import RMSNorm
from longspan.models.params import Param
from longspan.models.rope import apply_rope


class GroupedQueryAttention:
    """One layer's attention on the heads its loader gives."""

    def __init__(self, config: ModelConfig, layer: int, prefix: str, context: LayerContext) -> None:
        load, linear, extent = context.loader.load, context.loader.linear, context.loader.extent
        hidden, dim, q_heads, kv_heads = config.hidden_size, config.head_dim, config.num_q_heads, config.num_kv_heads
        qkv = (("q", q_heads, "q_heads"), ("k", kv_heads, "kv_heads"), ("v", kv_heads, "kv_heads"))
        self._tp = context.tp
        self._dim = dim
        self._qkv = linear(
            *(Param(f"{prefix}.{n}_proj.weight", (heads * dim, hidden), (axis, None), dim) for n, heads, axis in qkv)
        )
        self._o = linear(Param(f"{prefix}.o_proj.weight", (hidden, q_heads * dim), (None, "q_heads"), dim))
        self._qkv_bias: Tensor | None = None
        self._o_bias: Tensor | None = None
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        sink: Tensor | None = None
        if config.attention_bias:
            self._qkv_bias = load(
                *(Param(f"{prefix}.{n}_proj.bias", (heads * dim,), (axis,), dim) for n, heads, axis in qkv)
            )
        if config.attention_output_bias:
            self._o_bias = load(Param(f"{prefix}.o_proj.bias", (hidden,), (None,)))
        if config.qk_norm:
            q_norm, k_norm = (load(Param(f"{prefix}.{n}_norm.weight", (dim,), (None,))) for n in ("q", "k"))
            self._norms = RMSNorm(q_norm, config.rms_norm_eps), RMSNorm(k_norm, config.rms_norm_eps)
        if config.attention_sinks:
            sink = load(Param(f"{prefix}.sinks", (q_heads,), ("q_heads",), exact=True))
        self._layer = AttentionLayer(layer, config.window(layer), sink)
        (q_start, q_stop), (kv_start, kv_stop) = extent("q_heads", q_heads), extent("kv_heads", kv_heads)
        self._q_heads, self._kv_heads = q_stop - q_start, kv_stop - kv_start

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, hidden] → [T, hidden], summed over the TP group."""
        heads = self._qkv(x, self._qkv_bias).view(x.shape[0], self._q_heads + 2 * self._kv_heads, self._dim)
        rotated, v = heads[:, : -self._kv_heads], heads[:, -self._kv_heads :]
        if self._norms is None:
            rotated = apply_rope(rotated, cos, sin)
            q, k = rotated[:, : self._q_heads], rotated[:, self._q_heads :]
        else:
            q_norm, k_norm = self._norms
            q = apply_rope(q_norm(rotated[:, : self._q_heads]), cos, sin)
            k = apply_rope(k_norm(rotated[:, self._q_heads :]), cos, sin)
        out = attend(self._layer, q, k, v).reshape(x.shape[0], self._q_heads * self._dim)
        summed = self._tp.all_reduce(self._o(out))
        return summed if self._o_bias is None else summed + self._o_bias
