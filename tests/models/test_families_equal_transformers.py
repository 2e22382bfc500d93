"""Every family and rope scaling: log-probabilities and greedy tokens are transformers'."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from longspan import LLM, SamplingParams
from longspan.attention.workload import ExpansionCost
from longspan.config import CostConstants, EngineConfig
from longspan.engine.setup import resolve
from longspan.errors import ModelError
from longspan.models.registry import load_config
from tests.oracle import FAMILIES, GLM, LOGPROBS, TINY, all_logprobs, greedy, oracle, prompt_of, tiny_folder
from tests.traffic import schedules_that_moved

LENGTHS = (5, 150)  # 150 lies beyond the original positions of the llama3 and yarn scalings
TOKENS = 12


WIDE = pytest.param((4, 2, 2), id="tp4 pcp2 dcp2", marks=pytest.mark.slow)


@pytest.mark.parametrize("layout", [pytest.param((1, 1, 1), id="one rank"), WIDE])
@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_logprobs_and_tokens_equal_transformers(family, layout):
    tp, pcp, dcp = layout
    prompts = [prompt_of(length) for length in LENGTHS]
    with LLM(
        tiny_folder(family), tensor_parallel_size=tp, prefill_context_parallel_size=pcp,
        decode_context_parallel_size=dcp, page_size=4, max_num_batched_tokens=48, max_num_seqs=8, local_context=8,
        kv_cache_memory_bytes=1 << 20, num_threads=1, dtype="float32", cost=CostConstants(),
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=LOGPROBS))
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, expected = greedy(oracle(family), prompt, TOKENS)
        assert output.outputs[0].token_ids == tokens
        torch.testing.assert_close(all_logprobs(output.outputs[0]), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", ["gather_q", "gather_kv"])
@pytest.mark.parametrize("expands", [True, False], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 3, 2)], ids=["one rank", "tp2 pcp3 dcp2"])
def test_both_forms_of_latent_attention_give_the_same(layout, expands, schedule, monkeypatch):
    monkeypatch.setattr(ExpansionCost, "pays", lambda *_, **__: expands)
    monkeypatch.setattr("longspan.attention.prepared._EXPANDED_TOKENS", 7)
    tp, pcp, dcp = layout
    with LLM(
        tiny_folder("deepseek-v3"), tensor_parallel_size=tp, prefill_context_parallel_size=pcp,
        decode_context_parallel_size=dcp, page_size=4, max_num_batched_tokens=48, max_num_seqs=8, local_context=8,
        kv_cache_memory_bytes=1 << 20, num_threads=1, dtype="float32", schedule=schedule, cost=CostConstants(),
    ) as llm:  # fmt: skip
        outputs = llm.generate([prompt_of(n) for n in LENGTHS], SamplingParams(temperature=0, max_tokens=TOKENS))
        assert schedules_that_moved(llm) == ({schedule} if pcp * dcp > 1 else set())
    for length, output in zip(LENGTHS, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(oracle("deepseek-v3"), prompt_of(length), TOKENS)[0]


NAMES = {
    "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
}  # fmt: skip
WINDOW_FIELDS = [
    {},
    {"sliding_window": None},
    {"sliding_window": 50},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    {"use_sliding_window": False, "sliding_window": 50},
]


def windows_of_transformers(model_type: str, values: dict) -> list[int | None]:
    config = AutoConfig.for_model(model_type, **values)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if model_type == "llama" or window is None:
        return [None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


@pytest.mark.parametrize("fields", WINDOW_FIELDS, ids=str)
@pytest.mark.parametrize("model_type", NAMES)
def test_windows_are_those_of_the_family(model_type, fields):
    if model_type == "gpt_oss" and fields.get("sliding_window", 1) is None:
        pytest.skip("transformers refuses it")
    sizes = {**TINY, "max_position_embeddings": 9000, "num_hidden_layers": 30, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(model_type, **sizes, **fields)
    values = {**sizes, **{n: getattr(config, n) for n in ("num_experts", "num_local_experts", "moe_intermediate_size")
                          if hasattr(config, n)}, **fields, "architectures": [NAMES[model_type]]}  # fmt: skip
    found = load_config(values)
    assert [found.window(layer) for layer in range(30)] == windows_of_transformers(model_type, {**sizes, **fields})


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention"] * 31, "full_attention"])
def test_layer_types_that_are_not_one_a_layer_are_refused(types):
    values = {**TINY, "sliding_window": 9, "layer_types": types, "architectures": ["MistralForCausalLM"]}
    with pytest.raises(ModelError, match="must list num_hidden_layers=2 types"):
        load_config(values)


def test_a_glm_file_without_a_rotary_factor_rotates_what_transformers_does():
    found = load_config({**TINY, **GLM, "architectures": ["Glm4MoeForCausalLM"]})
    default = AutoConfig.for_model("glm4_moe").rope_parameters["partial_rotary_factor"]
    assert found.rope.partial_rotary_factor == default


def test_values_wider_than_queries_are_never_expanded():
    config = replace(load_config(AutoConfig.from_pretrained(tiny_folder("deepseek-v3")).to_dict()))
    wide = replace(config, mla=replace(config.mla, value_dim=20, kv_lora_rank=48))
    setup = replace(resolve(EngineConfig(tiny_folder("deepseek-v3"))), model=wide)
    assert not setup.attention_shape.expansion.pays(1e12, 1)


def test_the_expanded_form_pays_from_where_its_products_are_fewer():
    latent, rope, query, value = 512, 64, 128, 128
    cost = ExpansionCost.of(latent, rope, query, value)

    def saved(rows: int, tokens: int) -> float:
        pairs = rows * tokens
        return pairs * (2 * latent + rope) - pairs * (query + rope + value) - tokens * latent * (query + value)

    for rows in (1, 100, 170, 171, 300):
        for tokens in (1, 1000):
            assert cost.pays(rows * tokens, tokens) == (saved(rows, tokens) > 0)
    narrow = ExpansionCost.of(8, 0, 64, 64)  # latents narrower than heads
    assert not narrow.pays(1e12, 1)
