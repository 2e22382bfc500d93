"""Every family and rope scaling: log-probabilities and greedy tokens are transformers'."""

import pytest
import torch

from longspan import LLM, SamplingParams
from longspan.attention.facts import ExpansionCost
from tests.oracle import FAMILIES, LOGPROBS, all_logprobs, greedy, oracle, prompt_of, tiny_folder

LENGTHS = (5, 150)  # 150 lies beyond the original positions of the llama3 and yarn scalings
TOKENS = 12


@pytest.mark.parametrize("layout", [(1, 1, 1), (4, 2, 2)], ids=["one rank", "tp4 pcp2 dcp2"])
@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_logprobs_and_tokens_equal_transformers(family, layout):
    tp, pcp, dcp = layout
    prompts = [prompt_of(length) for length in LENGTHS]
    with LLM(
        tiny_folder(family), tensor_parallel_size=tp, prefill_context_parallel_size=pcp,
        decode_context_parallel_size=dcp, page_size=4, max_num_batched_tokens=48, max_num_seqs=8, local_context=8,
        kv_cache_memory_bytes=1 << 20, num_threads=1,
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
    monkeypatch.setattr("longspan.attention.forms._EXPANDED_TOKENS", 7)
    tp, pcp, dcp = layout
    with LLM(
        tiny_folder("deepseek-v3"), tensor_parallel_size=tp, prefill_context_parallel_size=pcp,
        decode_context_parallel_size=dcp, page_size=4, max_num_batched_tokens=48, max_num_seqs=8, local_context=8,
        kv_cache_memory_bytes=1 << 20, num_threads=1, schedule=schedule,
    ) as llm:  # fmt: skip
        outputs = llm.generate([prompt_of(n) for n in LENGTHS], SamplingParams(temperature=0, max_tokens=TOKENS))
    for length, output in zip(LENGTHS, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(oracle("deepseek-v3"), prompt_of(length), TOKENS)[0]


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
