"""The configuration of a decoder, read from a config.json in Hugging Face's format.

It owns `ModelConfig` and the checks of the fields that it is read from. Pure Python: it must not import torch, nor know
how a model is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspan.errors import ModelError, UnsupportedModel


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its scaling."""

    # base of the frequencies
    theta: float = 10000.0
    # name of the scaling; `default` for none
    rope_type: str = "default"
    # (name, value) of the scaling's fields (`factor`, say) as they are in the file
    scaling: tuple[tuple[str, Any], ...] = ()
    # part of a head's elements that are rotated
    partial_rotary_factor: float = 1.0
    # most positions of the model
    max_position_embeddings: int = 2048

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the scaling."""
        return dict(self.scaling).get(name, default)

    def require(self, name: str) -> Any:
        """A field that the scaling needs. Raises `ModelError` if it is missing."""
        if self.get(name) is None:
            raise ModelError(f"rope_scaling.{name} is missing: rope_type={self.rope_type} needs it; fix config.json")
        return self.get(name)


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): a latent and one rotary key are cached for each token."""

    # rank of the query projection; None if it has full rank
    q_lora_rank: int | None
    # elements of a latent
    kv_lora_rank: int
    # elements of a head's query and key without position
    query_dim: int
    # elements of a head's query and key that are rotated
    rope_dim: int
    # elements of a head's value
    value_dim: int
    # whether the two elements of a rotary pair are adjacent in the weights, and not half a head apart
    interleaved: bool = True


@dataclass(frozen=True)
class MoEConfig:
    """Sizes, routing and parameter names of a mixture of experts."""

    # routed experts of a layer
    num_experts: int
    # experts that each token is routed to
    experts_per_token: int
    # width of a routed expert
    intermediate_size: int
    # layers that have a mixture; the others have a dense MLP
    layers: frozenset[int]
    # name of the mixture's module in the checkpoint
    block: str = "mlp"
    # names of an expert's gate, up and down projections
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    # `softmax`, `sigmoid`, or `softmax_of_chosen`: over the logits of the chosen experts only
    scoring: str = "softmax"
    # whether the weights of a token's experts are divided by their sum
    normalise: bool = True
    # factor on the weights
    scaling: float = 1.0
    # groups of experts; with more than one, experts are chosen from the best groups only
    num_groups: int = 1
    # groups from which a token's experts are chosen
    groups_per_token: int = 1
    # number of a group's best experts whose scores are summed to the group's score
    group_top: int = 1
    # whether a learned bias is added to the scores when experts are chosen
    correction_bias: bool = False
    # width of the shared expert; 0 for none
    shared_intermediate_size: int = 0
    # name of the router
    router: str = "gate"
    # whether the router has a bias
    router_bias: bool = False
    # whether a tensor holds one projection of all experts; these experts have biases
    stacked: bool = False
    # limit of gpt-oss's clamped activation; None for SwiGLU
    swiglu_limit: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query or latent attention."""

    # name in the config.json
    architecture: str
    # decoder layers
    num_layers: int
    # width of the hidden states
    hidden_size: int
    # query heads
    num_q_heads: int
    # KV heads of the cache: 1 with latent attention
    num_kv_heads: int
    # elements of a cached row: with latent attention those of latent and rotary key together
    head_dim: int
    # width of a dense MLP
    intermediate_size: int
    # tokens in the vocabulary
    vocab_size: int
    # most positions that the model was trained for
    max_position_embeddings: int
    # added to the mean square in every norm
    rms_norm_eps: float
    # rotary position embedding
    rope: RopeConfig
    # whether the output head is the embedding table
    tie_word_embeddings: bool = False
    # whether the q, k and v projections have biases
    attention_bias: bool = False
    # whether the output projection of attention has a bias
    attention_output_bias: bool = False
    # whether the projections of a dense MLP have biases
    mlp_bias: bool = False
    # whether each head of q and k is normalised before rope
    qk_norm: bool = False
    # tokens that end a completion
    eos_token_ids: tuple[int, ...] = ()
    # mixtures of experts; None if all layers are dense
    moe: MoEConfig | None = None
    # latent attention; None for grouped-query attention
    mla: MLAConfig | None = None
    # layers for multi-token prediction, which follow the others in the checkpoint and are not loaded
    num_draft_layers: int = 0
    # for each layer, positions that a token sees, its own included, or None for all; empty if no layer has a window
    windows: tuple[int | None, ...] = ()
    # whether each query head has a sink
    attention_sinks: bool = False

    def window(self, layer: int) -> int | None:
        """Number of positions that a token sees in the layer, its own included; None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def layer_groups(self) -> tuple[int | None, ...]:
        """The width of window of each layer group, widest first: the distinct windows of the layers."""
        found = {self.window(layer) for layer in range(self.num_layers)}
        return tuple(sorted(found, key=lambda window: -(window or self.max_position_embeddings + 1)))

    @property
    def rotary_dim(self) -> int:
        """Elements of a head to which `partial_rotary_factor` applies."""
        return self.mla.rope_dim if self.mla else self.head_dim

    @property
    def kv_factor(self) -> int:
        """Rows of a cached token in each layer and KV head: 2 for keys and values, 1 for a latent."""
        return 1 if self.mla else 2

    @property
    def cached_value_dim(self) -> int:
        """Width of a result over cached rows: that of a head's value, or of the latent."""
        return self.mla.kv_lora_rank if self.mla else self.head_dim

    @property
    def attention_scale(self) -> float:
        """The factor on scores: 1 / sqrt(query width). With MLA and YaRN it has a correction (DeepSeek-V2's code)."""
        if self.mla is None:
            return float(self.head_dim**-0.5)
        correction = 1.0
        mscale, factor = self.rope.get("mscale_all_dim"), self.rope.get("factor") or 1.0
        if self.rope.rope_type == "yarn" and mscale and factor > 1:
            correction = 0.1 * float(mscale) * math.log(factor) + 1.0
        return float((self.mla.query_dim + self.mla.rope_dim) ** -0.5) * correction * correction


class Fields:
    """A configuration dict whose fields are checked as they are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def names(self, name: str) -> bool:
        """Whether the file has the field, even if it is null."""
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or `default` if it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """The value of a field that must be a positive integer; else raises `ModelError`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {name}={value!r} must be a positive integer; fix the model's config.json")
        return value

    def number(self, name: str, default: float) -> float:
        """The value of a field that must be a positive number; else raises `ModelError`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"config.json: {name}={value!r} must be a positive number; fix the model's config.json")
        return float(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """The value of a field that is one token id, a list of them, or missing."""
        value = self.get(name, [])
        return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def read_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Rope from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which has both in newer files."""
    parameters = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or fields.number("rope_theta", 10000.0)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    partial = parameters.pop("partial_rotary_factor", None) or fields.number("partial_rotary_factor", 1.0)
    scaling = tuple(
        sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in parameters.items())
    )
    return RopeConfig(float(theta), str(rope_type), scaling, float(partial), max_position_embeddings)


def read_windows(fields: Fields, default: int | None, first: int = 0) -> tuple[int | None, ...]:
    """The window of each layer, for `ModelConfig.windows`.

    The width is `sliding_window`, or `default` if the file does not have this field. `layer_types` says which layers
    have it; without this field all layers from number `first` on do. Raises `ModelError` or `UnsupportedModel`.
    """
    given = fields.size("sliding_window") if fields.get("sliding_window") else None
    window = given if fields.names("sliding_window") else default
    if window is None:
        return ()
    layers = range(fields.size("num_hidden_layers"))
    types = fields.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in layers]
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != len(layers):
        raise ModelError(
            f"config.json: layer_types={types!r} must list num_hidden_layers={len(layers)} types; fix the config.json"
        )
    for kind in types:
        if kind not in known:
            raise UnsupportedModel(f"config.json: layer_types={kind!r} is not supported; known are {', '.join(known)}")
    return tuple(known[kind] for kind in types)


def read_config(values: Mapping[str, Any], architecture: str, **differences: Any) -> ModelConfig:
    """The configuration from the fields that all families share. `differences` replace fields of the result."""
    fields = Fields(values)
    hidden, q_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", q_heads)
    if q_heads % kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads={q_heads} is not a multiple of num_key_value_heads={kv_heads}; "
            "fix the model's config.json"
        )
    positions = fields.size("max_position_embeddings", 2048)
    rope = read_rope(fields, positions)
    common: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": hidden,
        "num_q_heads": q_heads,
        "num_kv_heads": kv_heads,
        "head_dim": fields.size("head_dim", hidden // q_heads),
        "intermediate_size": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_position_embeddings": positions,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "eos_token_ids": fields.ids("eos_token_id"),
    }
    return ModelConfig(**{**common, **differences})
