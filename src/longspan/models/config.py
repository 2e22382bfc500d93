"""What a decoder is, read from a Hugging Face style configuration: sizes, rope, biases.

It owns `ModelConfig` and the checks on the fields it is read from; pure Python, it must not import
torch nor know how a model is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspan.errors import ModelError, UnsupportedModel


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `scaling` holds the scaling's own fields (`factor`, ...) as read."""

    theta: float = 10000.0
    rope_type: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 2048

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the scaling."""
        return dict(self.scaling).get(name, default)

    def require(self, name: str) -> Any:
        """A field the scaling cannot do without; raises `ModelError` if it is missing."""
        if self.get(name) is None:
            raise ModelError(f"rope_scaling.{name} is missing: rope_type={self.rope_type} needs it; fix config.json")
        return self.get(name)


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): what is cached is a latent and one rotary key a token.

    `query_dim` of a head is its part without position, `rope_dim` the part with; `q_lora_rank` None is a full-rank
    query projection; `interleaved` rotary pairs are adjacent in the weights.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    query_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True


@dataclass(frozen=True)
class MoEConfig:
    """Sizes, routing and names of a mixture.

    `scoring` is softmax, sigmoid or softmax_of_chosen (over the logits of the chosen alone); with `num_groups` > 1
    only the best `groups_per_token` groups of experts compete, a group's score being its best expert's (`group_top`
    1) or the sum of its best two. `layers` are those that have a mixture, the others are dense. `names` are the gate,
    up and down projections of an expert; `stacked` experts lie in tensors for all of them, with biases.
    `swiglu_limit` is gpt-oss's clamped activation.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: frozenset[int]
    block: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    scoring: str = "softmax"
    normalise: bool = True
    scaling: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    group_top: int = 1
    correction_bias: bool = False
    shared_intermediate_size: int = 0
    router: str = "gate"
    router_bias: bool = False
    stacked: bool = False
    swiglu_limit: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query or latent attention.

    `num_kv_heads` and `head_dim` are those of the cache: MLA has one head, as wide as latent and rotary key together.
    `num_draft_layers` follow the layers in the checkpoint and are not read (multi-token prediction). `windows` has for
    each layer how many positions a token sees with its own, None for all; empty where no layer has a window.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    num_draft_layers: int = 0
    windows: tuple[int | None, ...] = ()
    attention_sinks: bool = False

    def window(self, layer: int) -> int | None:
        """How many positions a token of the layer sees, its own with them; None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def layer_groups(self) -> tuple[int | None, ...]:
        """The windows there are, widest first."""
        found = {self.window(layer) for layer in range(self.num_layers)}
        return tuple(sorted(found, key=lambda window: -(window or self.max_position_embeddings + 1)))

    @property
    def rotary_dim(self) -> int:
        """The part of a head that is rotated, before `partial_rotary_factor`."""
        return self.mla.rope_dim if self.mla else self.head_dim

    @property
    def kv_factor(self) -> int:
        """Cache rows a token and layer: keys and values, or one latent for both."""
        return 1 if self.mla else 2

    @property
    def cached_value_dim(self) -> int:
        """Width of an attention result: a head's value, or the latent it is expanded from."""
        return self.mla.kv_lora_rank if self.mla else self.head_dim

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied with: 1 / sqrt(query width), times yarn's correction for MLA."""
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
        """Whether the file has the field, be it null."""
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it is, `default` where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {name}={value!r} must be a positive integer; fix the model's config.json")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"config.json: {name}={value!r} must be a positive number; fix the model's config.json")
        return float(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: none, one or a list."""
        value = self.get(name, [])
        return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def read_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Rope from `rope_theta` and `rope_scaling`, or from newer files' `rope_parameters`, which holds both."""
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
    """Each layer's window, from `sliding_window` (`default` where the file does not name it) and `layer_types`.

    Without types all layers from number `first` on have it. Empty if none has.
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
    """The fields every family shares; `differences` are those in which a family is its own."""
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
