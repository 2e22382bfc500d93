"""A quantised cache changes the tokens as its rounding does, and no layout changes them further."""

from __future__ import annotations

import pytest

from longspan import ConfigError, SamplingParams
from tests.oracle import greedy, oracle, prompt_of
from tests.pairs import in_turn
from tests.traffic import schedules_that_moved

PROMPTS = [prompt_of(61), prompt_of(5, 3), prompt_of(33, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LAYOUTS = [{"pcp": 3}, {"tp": 4, "dcp": 2}, {"tp": 2, "pcp": 2, "dcp": 2}, {"pp": 2, "pcp": 2}]


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize(("model", "layout"), in_turn(["llama", "deepseek-v3", "gpt-oss"], LAYOUTS, each=2), ids=str)
def test_every_layout_gives_the_tokens_of_one_rank(tiny, model, dtype, layout):
    alone = tokens_of(tiny(model, kv_cache_dtype=dtype))
    assert (
        tokens_of(
            tiny(
                model,
                kv_cache_dtype=dtype,
                local_context=0,
                page_size=4,
                max_num_batched_tokens=23,
                max_num_seqs=4,
                **layout,
            )
        )
        == alone
    )


@pytest.mark.parametrize("schedule", ["gather_q", "gather_q_rs", "ring_q", "tree_q", "gather_kv", "ring_kv"])
@pytest.mark.parametrize("model", ["llama", "deepseek-v3"])
def test_every_schedule_gives_the_tokens_of_one_rank(tiny, model, schedule):
    alone = tokens_of(tiny(model, kv_cache_dtype="int8"))
    llm = tiny(model, kv_cache_dtype="int8", local_context=0, pcp=2, schedule=schedule)
    assert tokens_of(llm) == alone
    assert schedules_that_moved(llm) == {schedule}


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_cached_prefixes_give_the_same_tokens(tiny, dtype):
    llm = tiny(kv_cache_dtype=dtype, pcp=2, local_context=0, page_size=4)
    first, again = tokens_of(llm), tokens_of(llm)
    assert again == first
    assert llm.generate([PROMPTS[0]], GREEDY)[0].num_cached_tokens == 60


def test_a_quantised_cache_holds_more_tokens_in_the_same_memory(tiny):
    """Head dim 4 of the tiny model: 16 bytes a row in fp32, in int8 4 and 4 for its scale."""
    tokens = [tiny(kv_cache_dtype=dtype).engine.setup.capacity_tokens for dtype in ("auto", "int8")]
    assert tokens[1] / tokens[0] == 2


def test_int8_changes_few_tokens_of_a_tiny_model(tiny):
    expected = [greedy(oracle("llama"), prompt, 12)[0] for prompt in PROMPTS]
    same = [
        a == b
        for found, wanted in zip(tokens_of(tiny(kv_cache_dtype="int8")), expected, strict=True)
        for a, b in zip(found, wanted, strict=True)
    ]
    assert sum(same) >= 0.7 * len(same)


def test_an_unknown_cache_dtype_names_those_there_are(tiny):
    with pytest.raises(ConfigError, match=r"kv_cache_dtype=int4: unknown choice; use one of auto, int8"):
        tiny(kv_cache_dtype="int4")
