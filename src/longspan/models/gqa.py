"""Grouped-query attention of one layer: projections, q/k norm, rope.

It owns the way from hidden states to q, k, v and back; attention itself is handed in.
"""

from __future__ import annotations

from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.models.config import ModelConfig
from longspan.models.context import Attend, Provided
from longspan.models.layers import RMSNorm
from longspan.models.params import Param
from longspan.models.rope import apply_rope


def gqa_params(config: ModelConfig, prefix: str) -> dict[str, Param]:
    """The layer's parameters by role."""
    hidden, dim = config.hidden_size, config.head_dim
    params: dict[str, Param] = {}
    for role, heads, axis in (
        ("q", config.num_q_heads, "q_heads"),
        ("k", config.num_kv_heads, "kv_heads"),
        ("v", config.num_kv_heads, "kv_heads"),
    ):
        params[role] = Param(f"{prefix}.{role}_proj.weight", (heads * dim, hidden), (axis, None), dim)
        if config.attention_bias:
            params[f"{role}_bias"] = Param(f"{prefix}.{role}_proj.bias", (heads * dim,), (axis,), dim)
    params["o"] = Param(f"{prefix}.o_proj.weight", (hidden, config.num_q_heads * dim), (None, "q_heads"), dim)
    if config.attention_output_bias:
        params["o_bias"] = Param(f"{prefix}.o_proj.bias", (hidden,), (None,))
    if config.qk_norm:
        params["q_norm"] = Param(f"{prefix}.q_norm.weight", (dim,), (None,))
        params["k_norm"] = Param(f"{prefix}.k_norm.weight", (dim,), (None,))
    if config.attention_sinks:
        params["sinks"] = Param(f"{prefix}.sinks", (config.num_q_heads,), ("q_heads",), exact=True)
    return params


class GroupedQueryAttention:
    """One layer's attention on the heads its loader gives."""

    def __init__(self, config: ModelConfig, layer: int, prefix: str, given: Provided) -> None:
        params = gqa_params(config, prefix)
        sink = given.loader.load(params["sinks"]) if config.attention_sinks else None
        self._layer = AttentionLayer(layer, config.window(layer), sink)
        self._tp = given.tp
        self._dim = config.head_dim
        self._qkv = given.loader.linear(params["q"], params["k"], params["v"])
        self._o = given.loader.linear(params["o"])
        self._qkv_bias: Tensor | None = None
        self._o_bias: Tensor | None = None
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.attention_bias:
            self._qkv_bias = given.loader.load(params["q_bias"], params["k_bias"], params["v_bias"])
        if config.attention_output_bias:
            self._o_bias = given.loader.load(params["o_bias"])
        if config.qk_norm:
            self._norms = (
                RMSNorm(given.loader.load(params["q_norm"]), config.rms_norm_eps),
                RMSNorm(given.loader.load(params["k_norm"]), config.rms_norm_eps),
            )
        q_start, q_stop = given.loader.extent("q_heads", config.num_q_heads)
        kv_start, kv_stop = given.loader.extent("kv_heads", config.num_kv_heads)
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
