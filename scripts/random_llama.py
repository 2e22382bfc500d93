"""A Llama of random weights as a Hugging Face folder, for measuring speed without a download.

    python scripts/random_llama.py FOLDER [--layers 16] [--hidden 2048] [--heads 32] [--kv-heads 8] [--ffn 8192]

The defaults are Llama-3.2-1B's shape: 1.24 billion parameters, the embedding shared with the head.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    for name, default in (("layers", 16), ("hidden", 2048), ("heads", 32), ("kv-heads", 8), ("ffn", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=128256)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
