"""GLM-4.5, GLM-4.5-Air and GLM-4.6: grouped-query attention with partial rope, and DeepSeek-V3's mixtures.

It owns the reading of their configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.models.config import ModelConfig, MoEConfig, read_config
from longspan.models.fields import MAX_LAYERS, Fields

_ROTATED = 0.5  # part of a head that is rotated, where the file does not say it
_MAX_SHARED = 256  # shared experts; they are one that is so many times as wide
ARCHITECTURES = ("Glm4MoeForCausalLM",)


def parse(values: Mapping[str, Any], architecture: str) -> ModelConfig:
    """The configuration. The first `first_k_dense_replace` layers are dense."""
    fields = Fields(values)
    return read_config(
        {**values, "partial_rotary_factor": fields.get("partial_rotary_factor", _ROTATED)},
        architecture,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        attention_bias=fields.flag("attention_bias", False),
        qk_norm=fields.flag("use_qk_norm", False),
        num_draft_layers=fields.count("num_nextn_predict_layers", 0, most=MAX_LAYERS),
        moe=_mixture(fields),
    )


def _mixture(fields: Fields) -> MoEConfig:
    wide, first = fields.size("moe_intermediate_size"), fields.count("first_k_dense_replace", 1)
    return MoEConfig(
        num_experts=fields.size("n_routed_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        intermediate_size=wide,
        layers=frozenset(range(first, fields.size("num_hidden_layers", most=MAX_LAYERS))),
        scoring="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scaling=fields.number("routed_scaling_factor", 1.0),
        num_groups=fields.size("n_group", 1),
        groups_per_token=fields.size("topk_group", 1),
        group_top=2,
        correction_bias=True,
        shared_intermediate_size=wide * fields.count("n_shared_experts", 1, most=_MAX_SHARED),
    )
