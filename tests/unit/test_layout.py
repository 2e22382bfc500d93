"""What a token costs in the cache, for real configurations, by the code the engine allocates with."""

import pytest

from longspan.config import ParallelConfig
from longspan.engine.capacity import cache_layout
from longspan.models.registry import load_config
from longspan.parallel.grid import Grid

BF16 = 2
MLA = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK_V3 = {
    **MLA, "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "hidden_size": 7168,
    "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432, "vocab_size": 129280,
    "q_lora_rank": 1536, "n_group": 8, "topk_group": 4,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    **MLA, "architectures": ["DeepseekV2ForCausalLM"], "num_hidden_layers": 27, "hidden_size": 2048,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944, "vocab_size": 102400,
}  # fmt: skip
LLAMA_3_405B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128,
    "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256,
}  # fmt: skip
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "tp", "expected"),
    [
        (DEEPSEEK_V3, 1, 70_272),
        (DEEPSEEK_V3, 8, 70_272),
        (DEEPSEEK_V2_LITE, 1, 31_104),
        (LLAMA_3_405B, 1, 516_096),
        (LLAMA_3_405B, 8, 64_512),
        (QWEN3_0_6B, 1, 114_688),
        (QWEN3_0_6B, 8, 14_336),
    ],
    ids=["DeepSeek-V3", "DeepSeek-V3 tp8", "V2-Lite", "Llama-3-405B", "Llama-3-405B tp8", "Qwen3-0.6B", "one KV head"],
)
def test_bytes_a_token_on_one_rank(values, tp, expected):
    assert cache_layout(Grid(ParallelConfig(tp)), load_config(values), BF16).bytes_per_token == expected


@pytest.mark.parametrize(("values", "row"), [(LLAMA_3_405B, 128 + 4), (DEEPSEEK_V3, 576 + 8)], ids=["GQA", "MLA"])
def test_a_quantised_row_takes_a_byte_an_element_and_four_a_scale(values, row):
    """A scale for each token and KV head; of MLA one for the latent and one for the rotary key."""
    layout = cache_layout(Grid(ParallelConfig(1)), load_config(values), 1, quantised=True)
    assert layout.row_bytes == row
    assert layout.bytes_per_token == layout.num_layers * layout.kv_factor * layout.kv_heads * row
