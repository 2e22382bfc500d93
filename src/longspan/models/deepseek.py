"""DeepSeek-V2, V2-Lite, V3 and R1, and Kimi-K2, which has V3's architecture.

It owns the reading of their configuration files: latent attention, the first layers dense, the others mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import MLAConfig, ModelConfig, MoEConfig, read_config
from longspan.models.fields import MAX_LAYERS, Fields

_MAX_SHARED = 256  # shared experts; they are one that is so many times as wide
_V2, _V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
ARCHITECTURES = (_V2, _V3)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. The cache has one KV head, whose rows are latent and rotary key."""
    fields = Fields(values)
    rank = fields.get("q_lora_rank")
    mla = MLAConfig(
        q_lora_rank=None if rank is None else fields.size("q_lora_rank"),
        kv_lora_rank=fields.size("kv_lora_rank"),
        query_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        value_dim=fields.size("v_head_dim"),
        interleaved=fields.flag("rope_interleave", True),
    )
    return read_config(
        values,
        architecture,
        num_kv_heads=1,
        head_dim=mla.kv_lora_rank + mla.rope_dim,
        mla=mla,
        num_draft_layers=fields.count("num_nextn_predict_layers", 0, most=MAX_LAYERS),
        moe=_mixture(fields, architecture) if fields.get("n_routed_experts") else None,
    )


def _mixture(fields: Fields, architecture: str) -> MoEConfig:
    v3 = architecture == _V3
    grouped = v3 or fields.get("topk_method") == "group_limited_greedy"
    layers = range(fields.count("first_k_dense_replace", 0), fields.size("num_hidden_layers", most=MAX_LAYERS))
    step, wide = fields.size("moe_layer_freq", 1), fields.size("moe_intermediate_size")
    return MoEConfig(
        num_experts=fields.size("n_routed_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        intermediate_size=wide,
        layers=frozenset(layer for layer in layers if layer % step == 0),
        scoring=fields.choice("scoring_func", "sigmoid" if v3 else "softmax", ("softmax", "sigmoid")),
        normalise=fields.flag("norm_topk_prob", v3),
        scaling=fields.number("routed_scaling_factor", 1.0),
        num_groups=fields.size("n_group", 1) if grouped else 1,
        groups_per_token=fields.size("topk_group", 1) if grouped else 1,
        group_top=2 if v3 else 1,
        correction_bias=v3,
        shared_intermediate_size=wide * fields.count("n_shared_experts", 0, most=_MAX_SHARED),
    )
