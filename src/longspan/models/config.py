"""The configuration of a decoder, read from a config.json in Hugging Face's format.

It owns `ModelConfig` and how it is read from the fields of the file. Pure Python: it must not import torch, nor know
how a model is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspan.errors import ModelError, UnsupportedModel
from longspan.models.fields import MAX_LAYERS, MAX_POSITIONS, MAX_SIZE, Fields, shown

_MAX_EXPERTS = 1 << 17  # of all layers together; Kimi-K2 has 23,040


_ROPE_OWN = ("rope_theta", "rope_type", "type", "partial_rotary_factor")  # fields of `RopeConfig`, not of the scaling
_ROPE_ZEROS = ("mscale", "mscale_all_dim")  # these may be 0
_ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "attention_factor", *_ROPE_ZEROS,
)  # fmt: skip


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
    # layers for multi-token prediction, which follow the others in the checkpoint
    num_draft_layers: int = 0
    # how many of them are loaded: 0, or 1 where the engine drafts with them
    loaded_draft_layers: int = 0
    # layers whose inputs a checkpoint of its own drafts from
    observed_layers: tuple[int, ...] = ()
    # for each layer, positions that a token sees, its own included, or None for all; empty if no layer has a window
    windows: tuple[int | None, ...] = ()
    # whether each query head has a sink
    attention_sinks: bool = False

    def window(self, layer: int) -> int | None:
        """Number of positions that a token sees in the layer, its own included; None for all."""
        return self.windows[layer] if self.windows else None

    def has_mixture(self, layer: int) -> bool:
        """Whether the layer has a mixture of experts. Draft layers are like the last layers of the model."""
        return self.moe is not None and (layer in self.moe.layers or layer >= self.num_layers)

    def cached_layers(self, first: int, stop: int) -> tuple[int, int]:
        """(first, stop) of the layers with a cache on the stage of layers [first, stop); the last drafts as well."""
        return first, stop + (self.loaded_draft_layers if stop == self.num_layers else 0)

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


def read_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Rope from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which has both in newer files.

    Raises `ModelError`, or `UnsupportedModel` if layers differ in their rope.
    """
    name = _rope_field(fields)
    scaling = fields.inner(name)
    values = dict(fields.get(name) or {})
    nested = next((key for key, value in values.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise UnsupportedModel(
            f"config.json: {name}.{nested}={shown(values[nested])} is a rope of some layers only, which is not "
            "supported; use a model with one rope"
        )
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0), least=1.0)
    partial = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0), most=1.0)
    rope_type = _rope_type(values)
    for key in _ROPE_NUMBERS:
        if scaling.get(key) is not None:
            scaling.number(key, least=-1.0 if key in _ROPE_ZEROS else 0.0)
    _check_factors(scaling)
    kept = {key: value for key, value in values.items() if key not in _ROPE_OWN}
    found = tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in kept.items()))
    return RopeConfig(theta, str(rope_type), found, partial, max_position_embeddings)


def _rope_field(fields: Fields) -> str:
    """The name of the field that has the rope. Raises `ModelError` if both are there and contradict each other."""
    scalings = []
    for name in ("rope_parameters", "rope_scaling"):
        fields.inner(name)  # checks that it is an object
        values = fields.get(name, {})
        kept = {key: value for key, value in values.items() if key not in _ROPE_OWN}
        scalings.append({**kept, "rope_type": _rope_type(values)} if values else None)
    if None not in scalings and scalings[0] != scalings[1]:
        problem = "contradicts rope_parameters, the newer name of the same field"
        raise fields.wrong("rope_scaling", fields.get("rope_scaling"), problem)
    return "rope_scaling" if scalings[0] is None else "rope_parameters"


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _check_factors(scaling: Fields) -> None:
    factors = scaling.get("factors", [])
    numbers = isinstance(factors, list) and all(type(each) in (int, float) and 0 < each < 1e30 for each in factors)
    if not numbers:
        raise scaling.wrong("factors", factors, "must be a list of positive numbers")
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise scaling.wrong("low_freq_factor", low, f"must be below high_freq_factor={high}")


def read_windows(fields: Fields, default: int | None, first: int = 0) -> tuple[int | None, ...]:
    """The window of each layer, for `ModelConfig.windows`.

    The width is `sliding_window`, or `default` if the file does not have this field. `layer_types` says which layers
    have it; without this field all layers from number `first` on do. Raises `ModelError` or `UnsupportedModel`.
    """
    given = fields.size("sliding_window", most=MAX_POSITIONS) if fields.get("sliding_window") else None
    window = given if fields.names("sliding_window") else default
    if window is None:
        return ()
    layers = range(fields.size("num_hidden_layers", most=MAX_LAYERS))
    types = fields.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in layers]
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != len(layers):
        raise ModelError(
            f"config.json: layer_types={shown(types)} must list num_hidden_layers={len(layers)} types; "
            "fix the config.json"
        )
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise UnsupportedModel(
                f"config.json: layer_types={shown(kind)} is not supported; known are {', '.join(known)}"
            )
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
    positions = fields.size("max_position_embeddings", 2048, MAX_POSITIONS)
    rope = read_rope(fields, positions)
    if "head_dim" not in differences and fields.get("head_dim") is None and hidden % q_heads:
        raise fields.wrong(
            "hidden_size", hidden, f"is no multiple of num_attention_heads={q_heads}, without a head_dim"
        )
    common: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": fields.size("num_hidden_layers", most=MAX_LAYERS),
        "hidden_size": hidden,
        "num_q_heads": q_heads,
        "num_kv_heads": kv_heads,
        "head_dim": fields.size("head_dim", hidden // q_heads),
        "intermediate_size": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_position_embeddings": positions,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "eos_token_ids": fields.ids("eos_token_id"),
    }
    config = ModelConfig(**{**common, **differences})
    _check_sizes(config)
    if any(token >= config.vocab_size for token in config.eos_token_ids):
        raise fields.wrong("eos_token_id", fields.get("eos_token_id"), f"is not in 0..{config.vocab_size - 1}")
    return config


def _check_sizes(config: ModelConfig) -> None:
    """Raise `ModelError` for sizes that are impossible together."""
    rotated = int(config.rotary_dim * config.rope.partial_rotary_factor)
    if rotated < 2 or rotated % 2:
        raise ModelError(
            f"config.json: head_dim={config.rotary_dim} with partial_rotary_factor={config.rope.partial_rotary_factor} "
            f"rotates {rotated} elements of a head, which must be a positive even number; fix the model's config.json"
        )
    mla, moe = config.mla, config.moe
    width = mla.query_dim + mla.rope_dim + mla.value_dim + mla.kv_lora_rank if mla else config.head_dim
    if config.num_q_heads * width > MAX_SIZE:
        raise ModelError(
            f"config.json: num_attention_heads={config.num_q_heads} of {width} elements each are more than {MAX_SIZE} "
            "elements; fix the model's config.json"
        )
    if moe is None:
        return
    if len(moe.layers) * moe.num_experts > _MAX_EXPERTS:
        raise ModelError(
            f"config.json: num_hidden_layers={config.num_layers} with {moe.num_experts} experts each are more than "
            f"{_MAX_EXPERTS} experts; fix the model's config.json"
        )
    if moe.experts_per_token > moe.num_experts:
        raise ModelError(
            f"config.json: num_experts_per_tok={moe.experts_per_token} exceeds the {moe.num_experts} experts; "
            "fix the model's config.json"
        )
    if moe.num_experts % moe.num_groups or moe.groups_per_token > moe.num_groups:
        raise ModelError(
            f"config.json: n_group={moe.num_groups} must divide the {moe.num_experts} experts and be at least "
            f"topk_group={moe.groups_per_token}; fix the model's config.json"
        )
