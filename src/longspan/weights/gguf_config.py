"""The metadata of a GGUF file as a Hugging Face config.json.

It owns the mapping from GGUF's keys to those of config.json; the models interpret the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.errors import ModelError, UnsupportedModel
from longspan.weights.gguf import GGUFCheckpoint

_ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}


def gguf_config(file: GGUFCheckpoint) -> dict[str, Any]:
    """The configuration of a GGUF model. Raises `UnsupportedModel` for an architecture without a mapping."""
    name = file.metadata("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"general.architecture={name!s:.80} in the GGUF file is not supported; "
            f"supported are {', '.join(_ARCHITECTURES)}"
        )
    architecture, model_type = _ARCHITECTURES[name]

    def field(key: str, default: Any = None) -> Any:
        return file.metadata(f"{name}.{key}", default)

    def size(key: str, default: int | None = None) -> int:
        value = field(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{file.path}: {name}.{key}={value!r:.80} must be a positive integer; download the file again"
            )
        return value

    window = field("attention.sliding_window")
    if window and architecture == "LlamaForCausalLM":  # Mistral's GGUF files have the architecture `llama`
        architecture, model_type = "MistralForCausalLM", "mistral"
    names = file.names()
    q_heads, hidden = size("attention.head_count"), size("embedding_length")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": q_heads,
        "num_key_value_heads": size("attention.head_count_kv", q_heads),
        "head_dim": field("attention.key_length") or field("rope.dimension_count") or hidden // q_heads,
        "vocab_size": next(iter(file.shape("model.embed_tokens.weight")), 0),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, name),
        "max_position_embeddings": size("context_length"),
        "sliding_window": window,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "eos_token_id": _end_tokens(file),
        "bos_token_id": file.metadata("tokenizer.ggml.bos_token_id"),
    }


def _rope_scaling(file: GGUFCheckpoint, architecture: str) -> dict[str, Any] | None:
    factors = file.rope_factors()
    if factors is not None:
        return {"rope_type": "factors", "factors": factors}
    prefix = f"{architecture}.rope.scaling"
    kind = file.metadata(f"{prefix}.type")
    if kind in (None, "none"):
        return None
    fields = {
        "rope_type": kind,
        "factor": file.metadata(f"{prefix}.factor"),
        "original_max_position_embeddings": file.metadata(f"{prefix}.original_context_length"),
        "attention_factor": file.metadata(f"{prefix}.attn_factor"),
    }
    return {key: value for key, value in fields.items() if value is not None}


def _end_tokens(file: GGUFCheckpoint) -> list[int]:
    ids = {kind: file.metadata(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    for kind, token in ids.items():
        if token is not None and type(token) is not int:
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{kind}_token_id={token!r:.80} is no token id; download the file again"
            )
    return sorted({token for token in ids.values() if token is not None})
