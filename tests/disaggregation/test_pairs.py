"""A prompt that one instance computes and another one continues gives the tokens of one instance, for all layouts."""

import pytest

from tests.disaggregation.pair import config_of, expected, pair
from tests.oracle import prompt_of

PAIRS = [
    ("llama", {"pcp": 2, "page_size": 16}, {"tp": 3, "dcp": 3, "page_size": 32}),
    ("llama", {"tp": 4, "page_size": 1}, {"pcp": 3, "page_size": 7}),
    ("llama", {"tp": 3, "pcp": 2, "page_size": 5}, {"tp": 4, "dcp": 2, "pp": 2, "page_size": 3}),
    ("llama-deep", {"pp": 3, "page_size": 4}, {"pp": 2, "tp": 2, "page_size": 8}),
    ("llama-multi-query", {"tp": 4, "dcp": 2, "page_size": 3}, {"tp": 6, "page_size": 16}),
    ("deepseek-v3", {"pcp": 3, "page_size": 4}, {"tp": 2, "dcp": 2, "page_size": 6}),
    ("deepseek-v3", {"tp": 4, "page_size": 2}, {"pcp": 2, "tp": 2, "page_size": 5}),
    ("gpt-oss", {"tp": 2, "pcp": 2, "page_size": 3}, {"page_size": 4}),
]


@pytest.mark.parametrize(("model", "prefill", "decode"), PAIRS, ids=str)
def test_the_tokens_of_any_two_layouts_are_those_of_one_instance(model, prefill, decode):
    lengths = (100, 33, 9)
    prompts = [tuple(prompt_of(length)) for length in lengths]
    with pair(config_of(model, **prefill), config_of(model, **decode)) as both:
        for number, prompt in enumerate(prompts):
            both.decode.start(str(number), prompt, 8, (both.prefill.address,))
        for number, prompt in enumerate(prompts):
            assert both.decode.result(str(number)) == expected(model, prompt)
        both.prefill.settle()
        both.decode.settle()
        assert both.decode.core.role.counters.retried == 0
        # the last token is not fetched; a prompt of one page is computed by the decode instance
        both.assert_fetched(*(length - 1 for length in lengths if length - 1 > decode["page_size"]))


@pytest.mark.parametrize("kv", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("model", ["llama", "deepseek-v3"])
def test_quantised_rows_are_sent_with_their_scales(model, kv):
    prompt = tuple(prompt_of(100))
    layouts = config_of(model, kv=kv, pcp=2, page_size=8), config_of(model, kv=kv, tp=2, page_size=4)
    with pair(*layouts) as both:
        through_both = both.complete("0", prompt)
        both.decode.start(
            "1", [*prompt[:50], 1, *prompt[51:]], 8
        )  # computed by the decode instance, because it names no address
        both.prefill.start("2", prompt, 8)
        assert through_both == both.prefill.result("2")
        both.assert_fetched(99)


def test_pages_are_sent_between_processes():
    prompt = tuple(prompt_of(100))
    with pair(config_of(executor="processes", pcp=2), config_of(executor="processes", tp=2, page_size=8)) as both:
        assert both.complete("0", prompt) == expected("llama", prompt)
        both.assert_fetched(99)


def test_the_bytes_received_are_those_of_the_tokens():
    prompt = tuple(prompt_of(100))
    with pair(config_of(pcp=2, page_size=8), config_of(tp=2, dcp=2, page_size=4)) as both:
        both.complete("0", prompt)
        row = both.decode.core.setup.layout
        counters = both.decode.core.role.counters
        assert counters.tokens == 99
        assert counters.bytes == 99 * row.with_kv_heads(4).bytes_per_token


def test_every_replica_of_a_head_receives_its_own_copy():
    prompt = tuple(prompt_of(100))
    with pair(config_of("deepseek-v3", pcp=2), config_of("deepseek-v3", tp=2)) as both:
        both.complete("0", prompt)
        assert both.decode.core.role.counters.bytes == 2 * 99 * both.decode.core.setup.layout.bytes_per_token


def test_pages_in_the_decode_instances_prefix_cache_are_not_sent():
    first, second = tuple(prompt_of(64)), tuple(prompt_of(64)) + tuple(prompt_of(40, seed=1))
    with pair(config_of(pcp=2), config_of(tp=2, dcp=2)) as both:
        both.complete("0", first)
        both.assert_fetched(63)
        assert both.complete("1", second) == expected("llama", second)
        assert both.decode.cached["1"] == 64
        both.assert_fetched(63, 103 - 64)


def test_fetched_pages_are_prefix_hits_for_other_requests():
    prompt = tuple(prompt_of(100))
    with pair(config_of(), config_of()) as both:
        both.complete("0", prompt)
        both.decode.start("1", prompt, 8)
        assert both.decode.result("1") == expected("llama", prompt)
        assert both.decode.cached["1"] == 96
        both.assert_fetched(99)


def test_a_prompt_that_is_cached_except_for_a_page_is_computed_by_the_decode_instance():
    prompt = tuple(prompt_of(100))
    with pair(config_of(), config_of()) as both:
        for number in range(2):
            assert both.complete(str(number), prompt) == expected("llama", prompt)
        both.assert_fetched(99)


def test_a_short_prompt_is_fetched_to_one_shard_and_decodes_onto_others():
    prompt = tuple(prompt_of(8))
    with pair(config_of(page_size=2), config_of(pcp=3, page_size=2)) as both:
        both.decode.start("0", prompt, 30, (both.prefill.address,))
        assert both.decode.result("0") == expected("llama", prompt, 30)
        both.assert_fetched(7)


def test_a_prompt_with_prompt_logprobs_is_computed_by_the_decode_instance():
    with pair(config_of(), config_of()) as both:
        assert both.complete("0", tuple(prompt_of(50)), prompt_logprobs=0) == expected("llama", tuple(prompt_of(50)))
        both.assert_fetched()


def test_penalties_count_the_tokens_of_a_fetched_prompt():
    prompt = tuple(prompt_of(100))
    with pair(config_of(), config_of(pcp=2)) as both:
        both.prefill.start("0", prompt, 8, repetition_penalty=1.7)
        assert both.complete("0", prompt, repetition_penalty=1.7) == both.prefill.result("0")
        both.assert_fetched(99)


def test_requests_wait_while_there_are_too_few_pages():
    prompts = [tuple(prompt_of(60, seed)) for seed in range(6)]
    small = config_of(memory=24 * 4 * 256)
    with pair(small, small) as both:
        assert sum(both.decode.core.setup.pages_per_shard) < 60 * 6 // 4
        for number, prompt in enumerate(prompts):
            both.decode.start(str(number), prompt, 30, (both.prefill.address,))
        for number, prompt in enumerate(prompts):
            assert both.decode.result(str(number)) == expected("llama", prompt, 30)
        both.prefill.settle()
        both.decode.settle()
        both.assert_fetched(*[59] * 6)


def test_pages_of_a_chunk_are_sent_while_the_next_chunk_is_computed():
    with pair(config_of(budget=16), config_of()) as both:
        running = both.prefill.core.scheduler.running
        both.prefill.pause_when = lambda: any(sequence.computed == 160 for sequence in running)
        both.decode.start("0", prompt_of(400), 4, (both.prefill.address,))
        both.decode.wait_until(lambda: both.decode.bytes_here == 160 * both.decode.core.setup.layout.bytes_per_token)
        both.prefill.pause_when = lambda: False
        assert both.decode.result("0") == expected("llama", tuple(prompt_of(400)), 4)
        both.assert_fetched(399)


def test_without_overlap_the_tokens_are_the_same():
    with pair(config_of(budget=16), config_of(), overlap=False) as both:
        assert both.complete("0", prompt_of(100)) == expected("llama", tuple(prompt_of(100)))
        both.assert_fetched(99)


def test_a_prefill_instance_also_serves_its_own_users():
    prompt = tuple(prompt_of(40))
    with pair(config_of(), config_of()) as both:
        both.prefill.start("7", prompt, 8)
        assert both.complete("0", prompt) == both.prefill.result("7") == expected("llama", prompt)
        assert list(both.prefill.outputs) == ["7"]
        both.assert_fetched(39)
