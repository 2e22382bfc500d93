"""A small model drafts what it would say itself of a text without its first token, and no token changes by it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from longspan import ConfigError, ModelError, SamplingParams
from tests.drafting import changed_folder, predictable_folder
from tests.engine.drafted import GREEDY, PROMPTS, drafts_in, named, plain_tokens, start, tokens_of
from tests.oracle import VOCAB, greedy, prompt_of, tiny_folder
from tests.pairs import every_pair


@pytest.fixture
def drafting(engines):
    """`drafting("qwen3:3", target="llama", tp=2, ...)` starts an engine for which a tiny model drafts 3 tokens."""

    def begin(drafts, target="llama", **options):
        name, _, count = drafts.partition(":")
        speculative = f"draft:{count}:{predictable_folder(name)}"
        return engines(predictable_folder(target), speculative=speculative, **options)

    return begin


def plain(target="llama", prompts=None, params=GREEDY, **options):
    """The tokens without drafts, of one rank."""
    return plain_tokens(predictable_folder(target), prompts, params, **options)


@cache
def reference(name):
    return AutoModelForCausalLM.from_pretrained(predictable_folder(name), dtype=torch.float32).eval()


def drafted_by(name, text, count):
    """What the model says after a text that it sees from the second token on."""
    return tuple(greedy(reference(name), text[1:], count)[0]) if count else ()


QUICK = [
    {"target": "llama", "drafts": "deepseek-v2-lite:3", "layout": {"tp": 2, "dcp": 2}, "page_size": 1, "chunk": 23},
    {
        "target": "llama-deep", "drafts": "llama-multi-query:2", "layout": {"pp": 2, "pcp": 2}, "page_size": 4,
        "chunk": 48, "hit": True,
    },
]  # fmt: skip
AXES = {
    "target": ["llama-deep", "deepseek-v3-deep"],
    "drafts": ["llama-multi-query:1", "deepseek-v2-lite:2", "llama-multi-head:4", "qwen3-moe:8"],
    "layout": [
        {}, {"tp": 3}, {"tp": 4, "dcp": 4}, {"tp": 4, "dcp": 2, "schedule": "ring_q"}, {"pcp": 3},
        {"tp": 2, "pcp": 2, "dcp": 2}, {"pp": 2, "tp": 2, "dcp": 2, "schedule": "tree_q"}, {"pp": 3, "pcp": 2},
    ],
    "page_size": [1, 2, 4, 16],
    "chunk": [13, 48],
    "hit": [False, True],
    "kv_cache_dtype": ["auto", "int8", "fp8_e4m3"],
}  # fmt: skip
ONE_BY_ONE = [
    {"target": "deepseek-v3", "drafts": "qwen3-moe:2", "layout": {"tp": 2, "pcp": 2, "enable_expert_parallel": True}},
    {"target": "gpt-oss", "drafts": "qwen2:3", "layout": {"tp": 2, "pcp": 2}},
    {"target": "mistral-windowed", "drafts": "mistral-windowed:3", "layout": {"tp": 2, "dcp": 2}},
    {"target": "glm4-moe", "drafts": "deepseek-v3:2", "layout": {"pcp": 2, "schedule": "gather_kv"}},
]


@pytest.mark.parametrize("case", named(QUICK))
def test_tokens_are_those_without_drafts_and_drafts_are_what_the_small_model_says(drafting, case):
    check(drafting, **case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", named([*every_pair(AXES), *ONE_BY_ONE]))
def test_every_two_choices_together(drafting, case):
    check(drafting, **case)


def check(drafting, target, drafts, layout, page_size=4, chunk=48, hit=False, kv_cache_dtype="auto"):
    llm = drafting(
        drafts, target, **layout, local_context=0, page_size=page_size, max_num_batched_tokens=chunk,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    found = drafts_in(llm)
    expected = plain(target, kv_cache_dtype=kv_cache_dtype)
    assert tokens_of(llm) == expected
    if hit:
        outputs = llm.generate(PROMPTS, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert any(output.num_cached_tokens for output in outputs)
    name = drafts.partition(":")[0]
    assert any(after for _, after in found)
    if kv_cache_dtype == "auto":
        for text, after in found:
            assert after == drafted_by(name, text, len(after))
    assert llm.stats().scheduler.accepted_tokens > 0
    llm.engine.scheduler.check_integrity()


def test_a_model_that_drafts_for_itself_is_nearly_always_right():
    """It errs where the first token of the text, which it does not see as a drafter, makes a difference."""
    folder = predictable_folder("llama", 0.003)
    with start(folder) as llm:
        expected = tokens_of(llm)
    with start(folder, speculative=f"draft:3:{folder}") as llm:
        assert tokens_of(llm) == expected
        counters = llm.stats().scheduler
        assert counters.accepted_tokens > 0.9 * counters.drafted_tokens > 0


def test_a_random_model_is_never_right_and_costs_no_token():
    with start(predictable_folder("llama"), speculative=f"draft:3:{tiny_folder('qwen3')}") as llm:
        assert tokens_of(llm) == plain()
        counters = llm.stats().scheduler
        assert counters.accepted_tokens < 0.2 * counters.drafted_tokens


def test_sampled_and_penalised_tokens_over_a_quantised_cache_are_those_without_drafts(drafting):
    fields = {"temperature": 0.5, "seed": 1, "presence_penalty": 1.0, "top_k": 5, "repetition_penalty": 1.2}
    params = SamplingParams(max_tokens=14, **fields)
    llm = drafting("qwen3:3", pcp=2, tp=2, dcp=2, page_size=2, local_context=0, kv_cache_dtype="int8")
    assert tokens_of(llm, params=params) == plain(params=params, kv_cache_dtype="int8")
    assert llm.stats().scheduler.accepted_tokens > 0


def test_two_continuations_of_a_cached_prefix_get_their_tokens(drafting):
    """The last row of a hit belongs to one continuation: the other one finds it as it is, and gets the same tokens."""
    llm = drafting("llama-multi-query:2", pcp=2, local_context=0)
    found = drafts_in(llm)
    shared = prompt_of(24, 8)
    first, second = [*shared, 5, 6, 7], [*shared, 50, 51, 52]
    for prompt in (first, second):
        assert tokens_of(llm, [prompt]) == plain(prompts=(tuple(prompt),))
    del found[:]
    (output,) = llm.generate([first], GREEDY)
    assert output.num_cached_tokens == 24
    assert output.outputs[0].token_ids == plain(prompts=(tuple(first),))[0]
    assert all(after == drafted_by("llama-multi-query", text, len(after)) for text, after in found)


def test_pages_that_return_from_host_memory_bring_its_rows(drafting):
    llm = drafting("deepseek-v2-lite:2", pages_per_shard=(20,), page_size=4, kv_offload_memory=1 << 20)
    first = tokens_of(llm, PROMPTS[2:])
    tokens_of(llm, PROMPTS[:1])
    found = drafts_in(llm)
    assert tokens_of(llm, PROMPTS[2:]) == first
    assert llm.stats().offload.loaded_from_memory > 0
    assert found and all(after == drafted_by("deepseek-v2-lite", text, len(after)) for text, after in found)


def test_its_rows_are_counted_in_the_capacity_by_their_own_bytes(drafting):
    target = 2 * 2 * 4 * 4 * 4  # layers, keys and values, KV heads, elements, bytes
    with start(predictable_folder("llama")) as llm:
        assert llm.engine.setup.capacity_tokens == (1 << 20) // (target * 4) * 4
    for drafts, own in (("llama-multi-query:2", 2 * 2 * 1 * 4 * 4), ("deepseek-v2-lite:2", 2 * 1 * 1 * 20 * 4)):
        assert drafting(drafts).engine.setup.capacity_tokens == (1 << 20) // ((target + own) * 4) * 4
    deep = drafting("llama-multi-query:2", target="llama-deep", pp=2).engine.setup
    assert deep.layout.bytes_per_token == target + 2 * 2 * 1 * 4 * 4  # of the last stage, which drafts


def with_tokens(folder, words):
    """Give a folder a tokenizer of single words."""
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(WordLevel(vocabulary, unk_token=words[0])).save(str(Path(folder) / "tokenizer.json"))
    return folder


def padded(name, size):
    """A copy of a predictable folder whose tables have `size` rows."""

    def pad(weights):
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            more = torch.ones(max(0, size - VOCAB), weights[table].shape[1]) * 0.5
            weights[table] = torch.cat((weights[table], more))[:size].clone()

    return changed_folder(predictable_folder(name), pad, {"vocab_size": size})


@pytest.mark.parametrize(("own", "others"), [(VOCAB, 103), (103, VOCAB)])
def test_tables_padded_to_different_sizes_draft_together(own, others):
    words = [f"w{number}" for number in range(VOCAB)]
    target, drafts = with_tokens(padded("llama", own), words), with_tokens(padded("qwen3", others), words)
    prompt = [*PROMPTS[0], own - 1]  # a token that only the larger table has
    outputs = []
    for options in ({}, {"speculative": f"draft:3:{drafts}", "tp": 2}):
        with start(target, **options) as llm:
            outputs.append(tokens_of(llm, [prompt, *PROMPTS]))
            accepted = llm.stats().scheduler.accepted_tokens
    assert outputs[0] == outputs[1]
    assert accepted > 0
    with_tokens(drafts, [*words[1:], "another"])
    with pytest.raises(ConfigError, match=r"speculative=draft:3:.*vocabulary .* are different; use a small model of"):
        start(target, speculative=f"draft:3:{drafts}")


REFUSED = {
    "windows that the model lacks": (
        lambda: tiny_folder("gpt-oss"),
        {}, "GptOssForCausalLM cannot draft for this model: it has layers that see the last 11 positions",
    ),
    "another vocabulary": (
        lambda: padded("llama", 103),
        {}, r"vocabulary \(103 tokens\) and the model's \(97\) are of other sizes; use a small model of the same",
    ),
    "heads that do not divide": (
        lambda: changed_folder(tiny_folder("llama"), fields={"num_attention_heads": 9, "num_key_value_heads": 3}),
        {"load_format": "dummy", "tp": 2},
        "tensor_parallel_size=2 must divide its own 9 query heads; use one of 1, 3, 9, .* use another model to draft",
    ),
    "no such folder": (lambda: "/nowhere", {}, "model=/nowhere: no such folder or file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_draft_is_refused_with_a_remedy(case):
    folder, options, message = REFUSED[case]
    with pytest.raises((ConfigError, ModelError), match=message):
        start(tiny_folder("llama"), speculative=f"draft:2:{folder()}", **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("draft:9:m", r"speculative=draft:9:m: unknown; .* draft:K:MODEL with K in 1\.\.8 or eagle3:K:PATH with K"),
        ("draft:2", "speculative=draft:2: unknown"),
        ("mtp:2:m", "speculative=mtp:2:m: unknown"),
        ("eagle3:0:m", "speculative=eagle3:0:m: unknown"),
    ],
)
def test_a_value_that_is_not_complete_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        start(tiny_folder("llama"), speculative=value)


def test_with_random_weights_it_drafts_without_its_files():
    folder = changed_folder(tiny_folder("llama"))
    (Path(folder) / "model.safetensors").unlink()
    with start(tiny_folder("llama"), load_format="dummy", speculative=f"draft:2:{folder}") as llm:
        tokens_of(llm, PROMPTS[:1])
        assert llm.stats().scheduler.drafted_tokens > 0
