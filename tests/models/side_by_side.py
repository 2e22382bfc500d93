"""A family that is no pre-norm Llama, as someone who uses the package would add it.

Positions are learned; attention and a GeLU MLP read the same row side by side; a LayerNorm follows their sum. Its plain
forward is `logits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.attention.layer import AttentionLayer
from longspan.models.config import ModelConfig, read_config
from longspan.models.context import Attend, LayerContext
from longspan.models.params import Param

ARCHITECTURES = ("SideBySideForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    return read_config(values, architecture)


class Block:
    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        load, linear, extent, name = (
            context.loader.load,
            context.loader.linear,
            context.loader.extent,
            f"blocks.{layer}",
        )
        hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
        axes = {"q": ("q_heads", config.num_q_heads), "k": ("kv_heads", config.num_kv_heads)}
        axes["v"] = axes["k"]
        self._heads = [stop - start for start, stop in (extent(*axes[role]) for role in "qkv")]
        self._dim, self._tp, self._layer = dim, context.tp, AttentionLayer(layer)
        self._qkv = linear(
            *(Param(f"{name}.{r}", (n * dim, hidden), (axis, None), dim) for r, (axis, n) in axes.items())
        )
        self._out = linear(Param(f"{name}.out", (hidden, config.num_q_heads * dim), (None, "q_heads"), dim))
        self._up = linear(Param(f"{name}.up", (wide, hidden), ("ffn", None)))
        self._up_bias = load(Param(f"{name}.up_bias", (wide,), ("ffn",)))
        self._down = linear(Param(f"{name}.down", (hidden, wide), (None, "ffn")))
        self._norm = load(Param(f"{name}.norm", (hidden,), (None,)))

    def __call__(self, x: Tensor, attend: Attend) -> Tensor:
        heads = self._qkv(x).unflatten(1, (-1, self._dim))
        seen = attend(self._layer, *heads.split(self._heads, dim=1)).flatten(1)
        both = self._out(seen) + self._down(F.gelu(self._up(x, self._up_bias)))
        return F.layer_norm(x + self._tp.all_reduce(both), self._norm.shape, self._norm)


class SideBySide:
    def __init__(self, config: ModelConfig, context: LayerContext, dtype: torch.dtype) -> None:
        load, sizes = context.loader.load, (config.vocab_size, config.hidden_size)
        first, stop = context.loader.extent("layers", config.num_layers)
        self.hidden_size, self.dtype, self._tp, self._ops = config.hidden_size, dtype, context.tp, context.ops
        self._first_token, _ = context.loader.extent("vocab", config.vocab_size)
        self.embedding = self.head = self._positions = None
        if first == 0:
            self._tokens = load(Param("tokens", sizes, ("vocab", None)))
            self._positions = load(Param("positions", (config.max_position_embeddings, sizes[1]), (None, None)))
            self.embedding = self._embed
        self._blocks = [Block(config, layer, context) for layer in range(first, stop)]
        if stop == config.num_layers:
            self._logits = context.loader.linear(Param("logits", sizes, ("vocab", None)))
            self.head = lambda hidden: self._tp.all_gather_last(self._logits(hidden)).float()

    def layers(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if self._positions is not None:
            x = x + self._positions[positions]
        for block in self._blocks:
            x = block(x, attend)
        return x

    def _embed(self, token_ids: Tensor) -> Tensor:
        return self._tp.all_reduce(self._ops.embed(token_ids, self._tokens, self._first_token))


build = SideBySide


def logits(weights: Mapping[str, Tensor], config: ModelConfig, tokens: list[int]) -> Tensor:
    """The last token's, by PyTorch alone: no cache, no ranks."""
    x = weights["tokens"][tokens] + weights["positions"][: len(tokens)]
    for layer in range(config.num_layers):
        each = {name.split(".")[-1]: tensor for name, tensor in weights.items() if f"blocks.{layer}." in name}
        q, k, v = (F.linear(x, each[role]).unflatten(1, (-1, config.head_dim)).transpose(0, 1) for role in "qkv")
        seen = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        inner = F.gelu(F.linear(x, each["up"], each["up_bias"]))
        both = F.linear(seen.transpose(0, 1).flatten(1), each["out"]) + F.linear(inner, each["down"])
        x = F.layer_norm(x + both, each["norm"].shape, each["norm"])
    return weights["logits"] @ x[-1]
