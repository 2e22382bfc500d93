"""A model of random weights as a Hugging Face folder, for measuring speed without a download.

    python scripts/random_model.py FOLDER [--family llama] [--layers 16] [--hidden 2048] [--heads 32] [--kv-heads 8]
        [--ffn 8192]
    python scripts/random_model.py FOLDER --family deepseek-v2 [--layers 4] [--experts 64]

The defaults are Llama-3.2-1B's shape (1.24 billion parameters, the embedding shared with the head), and DeepSeek-V2-
Lite's with 4 layers, of which the first is dense (2.1 billion parameters).
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

DEFAULTS = {
    "llama": {"layers": 16, "hidden": 2048, "heads": 32, "kv-heads": 8, "ffn": 8192, "vocab": 128256},
    "deepseek-v2": {"layers": 4, "hidden": 2048, "heads": 16, "ffn": 10944, "experts": 64, "vocab": 32000},
}


def llama(sizes: dict[str, int]) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """A Llama."""
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv-heads"],
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip


def deepseek_v2(sizes: dict[str, int]) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """A DeepSeek-V2-Lite: latent attention, experts from the second layer on."""
    return DeepseekV2ForCausalLM, DeepseekV2Config(
        vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], intermediate_size=sizes["ffn"],
        moe_intermediate_size=1408, num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"], kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=sizes["experts"], n_shared_experts=2,
        num_experts_per_tok=min(6, sizes["experts"]), first_k_dense_replace=1, topk_method="greedy", n_group=1,
        topk_group=1, max_position_embeddings=65536, dtype="bfloat16",
    )  # fmt: skip


FAMILIES = {"llama": llama, "deepseek-v2": deepseek_v2}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    for name in dict.fromkeys(name for sizes in DEFAULTS.values() for name in sizes):
        parser.add_argument(f"--{name}", type=int)
    folder, family, *given = vars(parser.parse_args()).items()
    found = {name.replace("_", "-"): size for name, size in given if size}
    sizes = DEFAULTS[family[1]]
    if found.keys() - sizes.keys():
        parser.error(f"--family {family[1]} has the sizes {', '.join(sizes)}")
    torch.manual_seed(0)
    build, config = FAMILIES[family[1]]({**sizes, **found})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = build(config).to(torch.bfloat16)
    model.save_pretrained(folder[1])


if __name__ == "__main__":
    main()
