"""Capacity: bytes of KV cache and weights by model, tokens by layout."""

import pytest

from longspan.config import ParallelConfig
from longspan.errors import ConfigError, ModelError, ModelNotFound
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import hardware
from longspan.planner.models import find_config, find_model
from longspan.weights.builtin import builtin_names
from longspan.weights.formats import WeightFormat

KV_BYTES = {
    "llama-3.1-8b": 131_072, "llama-3-70b": 327_680, "llama-3-405b": 516_096, "qwen3-0.6b": 114_688,
    "qwen3-8b": 147_456, "qwq-32b": 262_144, "qwen3-235b-a22b": 192_512, "gpt-oss-120b": 73_728,
    "smollm2-135m": 23_040, "deepseek-v2-lite": 31_104, "deepseek-v3": 70_272, "deepseek-r1": 70_272,
    "kimi-k2": 70_272, "kimi-k2-thinking": 70_272, "qwq-32b-fp8": 262_144, "qwen3-235b-a22b-fp8": 192_512,
    "glm-4.5": 376_832, "glm-4.5-air": 188_416,
}  # fmt: skip
CHECKPOINT_GB = {
    "llama-3-70b": 141, "kimi-k2-thinking": 594, "gpt-oss-120b": 65, "qwen3-235b-a22b": 470, "deepseek-v2-lite": 31.4,
}  # fmt: skip

ALONE = ParallelConfig()


def deployed(name: str, parallel: ParallelConfig = ALONE, machine: str = "h200") -> Deployment:
    model, weights = find_model(name)
    return Deployment(model, hardware(machine), parallel, weights, 2)


@pytest.mark.parametrize("name", builtin_names())
def test_the_bytes_of_a_cached_token_are_those_that_were_published(name):
    assert deployed(name).layout.bytes_per_token == KV_BYTES[name]


@pytest.mark.parametrize(("name", "gigabytes"), CHECKPOINT_GB.items())
def test_the_weights_of_a_single_rank_have_the_size_of_the_checkpoint(name, gigabytes):
    assert deployed(name).weight_bytes == pytest.approx(gigabytes * 1e9, rel=0.01)


def test_dcp_multiplies_the_tokens_of_a_latent_cache():
    once, eight = (deployed("kimi-k2-thinking", ParallelConfig(8, 1, dcp)) for dcp in (1, 8))
    assert eight.capacity_tokens == 8 * once.capacity_tokens


def test_a_row_of_a_quantised_cache_includes_its_scales():
    model, weights = find_model("llama-3-70b")
    eight_bits = Deployment(model, hardware("h200"), ParallelConfig(8), weights, 1)
    assert eight_bits.layout.bytes_per_token == 80 * 2 * (128 + 4)


def test_a_request_that_does_not_fit_is_refused_with_the_missing_bytes():
    with pytest.raises(ConfigError, match=r"lacks \d+\.\d GB for 1,000 tokens"):
        deployed("llama-3-405b", ParallelConfig(2), "h100").check_fits(1000)


def test_a_pipeline_stage_holds_its_layers_and_the_embedding_or_the_head():
    whole, half = deployed("llama-3-70b"), deployed("llama-3-70b", ParallelConfig(1, 1, 1, 2))
    assert half.weight_bytes == pytest.approx(whole.weight_bytes / 2)


def test_the_products_of_a_part_are_those_of_its_matrices():
    dense, latent, stacked = deployed("llama-3-70b"), deployed("kimi-k2"), deployed("gpt-oss-120b")
    assert (dense.attention.products, dense.ffn.products) == (2, 2)  # q, k and v are one, and so are gate and up
    assert (latent.attention.products, latent.router.products, latent.shared.products) == (5, 1, 2)
    assert (stacked.attention.products, stacked.expert.products) == (2, 2)


def test_a_model_can_be_named_with_another_number_of_kv_heads():
    assert find_config("qwen3-0.6b with 1 kv head")["num_key_value_heads"] == 1


def test_a_hub_id_of_a_built_in_model_needs_no_network():
    assert find_config("Qwen/Qwen3-8B") == find_config("qwen3-8b")


def test_an_unknown_model_is_refused_with_similar_names():
    with pytest.raises(ModelNotFound, match=r"lama-70b: .* use one of llama-3-70b"):
        find_config("lama-70b")


def test_a_malformed_config_is_refused_with_line_and_column(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4,\n "x" 3}')
    with pytest.raises(ModelError, match="line 2, column 6"):
        find_config(str(tmp_path))


def test_a_configuration_says_which_parts_are_quantised():
    spared = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.5.self_attn.o_proj"]}
    assert WeightFormat.of({"quantization_config": spared}) == WeightFormat(2.0, 1.0, 1.0, 2.0)
    four_bits = {"quant_method": "compressed-tensors", "weights": {"num_bits": 4}, "ignore": ["re:.*self_attn.*"]}
    assert WeightFormat.of({"quantization_config": four_bits}) == WeightFormat(2.0, 0.5625, 0.5625, 2.0)


def test_an_unknown_weight_format_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="use one of fp32, bf16"):
        WeightFormat.named("fp5")
