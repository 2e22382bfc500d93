"""What other code says the answer is: tiny models of every family, run by Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan import CompletionOutput
from longspan.bench.reference import cache_name
from tests.folders import shared_folder

VOCAB = 97  # divides by no rank count used here
LOGPROBS = 97

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip

QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "use_sliding_window": False}

MLA = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 24,
    "head_dim": 4, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "moe_intermediate_size": 20, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
DEEPSEEK_YARN = {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1}


GLM = {
    "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "attention_bias": True, "head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model: transformers' model type and how it differs from `TINY`."""

    name: str
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)


FAMILIES = [
    Family("llama", "llama"),
    Family("llama-tied", "llama", {"tie_word_embeddings": True}),
    Family("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Family("llama-multi-head", "llama", {"num_key_value_heads": 24}),
    Family("llama-multi-query", "llama", {"num_key_value_heads": 1}),
    Family("llama-linear-rope", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    Family("llama-llama3-rope", "llama", {"rope_parameters": LLAMA3_ROPE}),
    Family("llama-yarn-rope", "llama", {"rope_parameters": YARN_ROPE}),
    Family("llama-dynamic-rope", "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    Family("mistral", "mistral", {"sliding_window": None}),
    Family("qwen2", "qwen2", {"use_sliding_window": False}),
    Family("qwen3", "qwen3", {"use_sliding_window": False}),
    Family("mixtral", "mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    Family("qwen3-moe", "qwen3_moe", {**QWEN_MOE, "norm_topk_prob": True}),
    Family("qwen3-moe-dense-layer", "qwen3_moe", {**QWEN_MOE, "mlp_only_layers": [0]}),
    Family("mistral-windowed", "mistral", {"sliding_window": 20}),
    Family("mixtral-windowed", "mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7}),
    Family("qwen2-windowed", "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    Family(
        "gpt-oss",
        "gpt_oss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 11, "intermediate_size": 36},
    ),
    Family("deepseek-v2-lite", "deepseek_v2", {**MLA, "q_lora_rank": None, "topk_method": "greedy"}),
    Family(
        "deepseek-v2",
        "deepseek_v2",
        {**MLA, "q_lora_rank": 12, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    Family(
        "deepseek-v3",
        "deepseek_v3",
        {**MLA, "q_lora_rank": 12, "n_group": 3, "topk_group": 2, "rope_parameters": DEEPSEEK_YARN},
    ),
    Family("glm4-moe", "glm4_moe", {**GLM, "use_qk_norm": True, "n_group": 3, "topk_group": 2}),
    Family("glm4-moe-air", "glm4_moe", {**GLM, "partial_rotary_factor": 0.25, "norm_topk_prob": False}),
]
BY_NAME = {family.name: family for family in FAMILIES}
DEEP = [
    Family("llama-deep", "llama", {"num_hidden_layers": 4}),
    Family("llama-seven", "llama", {"num_hidden_layers": 7}),
    # heads of whole vectors, as kernels for CPUs take them
    Family("llama-wide", "llama", {"head_dim": 16, "tie_word_embeddings": True}),
    Family("qwen3-wide", "qwen3", {"head_dim": 16, "use_sliding_window": False}),
    Family("llama-wide-biases", "llama", {"head_dim": 16, "attention_bias": True}),
    Family("mistral-wide", "mistral", {"head_dim": 16, "sliding_window": 8}),
    Family("qwen3-seven", "qwen3", {"num_hidden_layers": 7, "use_sliding_window": False}),
    # latents as wide as the models', and heads enough for kernels that are made for them
    Family(
        "deepseek-v3-wide",
        "deepseek_v3",
        {
            **BY_NAME["deepseek-v3"].fields,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
        },
    ),
    Family("deepseek-v3-deep", "deepseek_v3", {**BY_NAME["deepseek-v3"].fields, "num_hidden_layers": 4}),
]
BY_NAME |= {family.name: family for family in DEEP}


@cache
def tiny_folder(name: str) -> str:
    """A Hugging Face folder with random weights of a family, without a tokenizer."""
    family = BY_NAME[name]
    torch.manual_seed(7)
    config = AutoConfig.for_model(family.model_type, **{**TINY, **family.fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "sinks")) or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):  # zero as it is made, and then nobody would miss it
                buffer.add_(torch.randn_like(buffer) * 0.2)
    folder = shared_folder(name)
    model.save_pretrained(folder)
    return str(folder)


@cache
def oracle(name: str) -> Any:
    """The same folder as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder(name), dtype=torch.float32).eval()


@cache
def oracle_in_bfloat16(name: str) -> Any:
    """The same folder rounded to bfloat16, and computed in it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder(name), dtype=torch.bfloat16).eval()


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their log-probabilities [num_tokens, vocab], over transformers' own cache."""
    tokens, logprobs = _greedy(model, tuple(prompt), num_tokens)
    return list(tokens), logprobs


@cache
@torch.inference_mode()
def _greedy(model: Any, prompt: tuple[int, ...], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    tokens: list[int] = []
    rows = []
    ids, name, past = torch.tensor([list(prompt)]), cache_name(model), None
    for _ in range(num_tokens):
        out = model(ids, **{name: past}, use_cache=True, logits_to_keep=1)
        past = out[name]
        rows.append(out.logits[0, -1].float().log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(rows)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def all_logprobs(output: CompletionOutput) -> torch.Tensor:
    """The log-probabilities [tokens, vocab] of an output that asked for all of them."""
    rows = torch.empty(len(output.logprobs), LOGPROBS)
    for row, entry in zip(rows, output.logprobs, strict=True):
        row[list(entry.top_ids)] = torch.tensor(entry.top_values)
    return rows
