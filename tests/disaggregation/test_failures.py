"""If an instance fails, requests complete with the same tokens, and both sides free their pages."""

import logging
import socket
from contextlib import contextmanager
from dataclasses import replace

import pytest

from longspan.config import TransferConfig
from longspan.disaggregation.sender import PageSender
from longspan.errors import ConfigError
from tests.disaggregation.pair import Running, config_of, expected, pair
from tests.oracle import prompt_of

PROMPT = tuple(prompt_of(200))


@contextmanager
def instance(role: str, config=None, **options):
    running = Running(
        replace(config or config_of(budget=16), transfer=TransferConfig(role, block_bytes=4096, **options))
    )
    try:
        yield running
    finally:
        running.close()


def in_the_middle(running: Running):
    """A condition: a prompt is computed in part."""
    return lambda: any(sequence.computed >= 48 for sequence in running.core.scheduler.running)


def test_a_prefill_instance_that_dies_is_replaced_by_another():
    with instance("decode", config_of(tp=2, dcp=2)) as decode, instance("prefill", config_of(pcp=2)) as second:
        with instance("prefill") as first:
            first.pause_when = in_the_middle(first)
            decode.start("0", PROMPT, 8, (first.address, second.address))
            decode.wait_until(lambda: decode.bytes_here > 0)
        assert decode.result("0") == expected("llama", PROMPT)
        assert decode.core.role.counters.retried == decode.core.role.counters.fetched == 1
        decode.settle()
        second.settle()


def test_the_decode_instance_computes_a_prompt_itself_if_no_prefill_instance_is_left():
    with instance("decode", config_of(tp=2, dcp=2)) as decode:
        with instance("prefill") as first:
            first.pause_when = in_the_middle(first)
            decode.start("0", PROMPT, 8, (first.address,))
            decode.wait_until(lambda: decode.bytes_here > 0)
        assert decode.result("0") == expected("llama", PROMPT)
        assert decode.core.role.counters.fetched == 0
        decode.settle()


def test_a_prompt_is_computed_here_if_nothing_listens_at_the_address():
    with socket.socket() as free, instance("decode") as decode:
        free.bind(("127.0.0.1", 0))
        decode.start("0", PROMPT, 8, (f"tcp://127.0.0.1:{free.getsockname()[1]}",))
        assert decode.result("0") == expected("llama", PROMPT)


def test_an_address_that_never_answers_is_given_up_after_patience_seconds():
    with socket.socket() as silent, instance("decode", patience_seconds=0.3) as decode:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        decode.start("0", PROMPT, 8, (f"tcp://127.0.0.1:{silent.getsockname()[1]}",))
        assert decode.result("0") == expected("llama", PROMPT)


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "tcp://127.0.0.1:99999", "http://127.0.0.1:80"])
def test_an_invalid_address_is_skipped(address):
    with instance("decode") as decode:
        decode.start("0", PROMPT, 8, (address,))
        assert decode.result("0") == expected("llama", PROMPT)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (config_of("qwen3"), "model configuration: the decode instance has"),
        (config_of(kv="int8"), "kv_cache_dtype: the decode instance has auto, the prefill instance int8"),
        (config_of(dtype="bfloat16"), "dtype: the decode instance has torch.float32, the prefill instance torch.bf"),
    ],
    ids=["model", "kv", "dtype"],
)
def test_an_instance_with_another_format_is_refused_and_the_log_has_the_difference(other, reason, caplog):
    with caplog.at_level(logging.WARNING), instance("prefill", other) as first, instance("decode") as decode:
        decode.start("0", PROMPT, 8, (first.address,))
        assert decode.result("0") == expected("llama", PROMPT)
        assert decode.core.role.counters.fetched == 0
    assert reason in caplog.text


def test_a_request_that_is_aborted_frees_pages_on_both_sides():
    with pair(config_of(budget=16), config_of()) as both:
        both.prefill.pause_when = in_the_middle(both.prefill)
        both.decode.start("0", PROMPT, 8, (both.prefill.address,))
        both.decode.wait_until(lambda: both.decode.bytes_here > 0)
        both.decode.call(lambda: both.decode.core.finish("0"))
        both.prefill.pause_when = lambda: False
        both.decode.settle()
        both.prefill.settle()


def test_pages_for_a_decode_instance_that_dies_are_freed():
    with instance("prefill") as first:
        with instance("decode") as decode:
            first.pause_when = in_the_middle(first)
            decode.start("0", PROMPT, 8, (first.address,))
            decode.wait_until(lambda: decode.bytes_here > 0)
        first.pause_when = lambda: False
        first.settle()


def test_pages_that_are_not_fetched_in_time_are_freed_and_the_request_completes():
    with pair(config_of(), config_of(memory=60 * 4 * 256), hold_seconds=0.5) as both:
        both.decode.start("0", prompt_of(120, seed=3), 100)  # holds most pages for a while
        both.decode.pause_when = lambda: False
        both.decode.start("1", PROMPT, 8, (both.prefill.address,))
        assert both.decode.result("1") == expected("llama", PROMPT)
        both.prefill.settle()


def test_a_prompt_that_is_preempted_in_the_prefill_instance_completes():
    prompts = [tuple(prompt_of(60, seed)) for seed in range(3)]
    with pair(config_of(memory=40 * 4 * 256, budget=16), config_of()) as both:
        both.prefill.start("9", prompt_of(20), 60)
        for number, prompt in enumerate(prompts):
            both.decode.start(str(number), prompt, 8, (both.prefill.address,))
        for number, prompt in enumerate(prompts):
            assert both.decode.result(str(number)) == expected("llama", prompt)
        both.prefill.result("9")
        both.prefill.settle()


def test_a_request_that_is_preempted_in_the_decode_instance_is_computed_again_there():
    prompts = [tuple(prompt_of(40, seed)) for seed in range(3)]
    with pair(config_of(), config_of(memory=40 * 4 * 256)) as both:
        for number, prompt in enumerate(prompts):
            both.decode.start(str(number), prompt, 40, (both.prefill.address,))
        for number, prompt in enumerate(prompts):
            assert both.decode.result(str(number)) == expected("llama", prompt, 40)
        assert both.decode.core.scheduler.preemptions > 0


def test_a_prompt_is_retried_if_the_prefill_instance_stops_sending(monkeypatch):
    monkeypatch.setattr(PageSender, "_send_block", lambda *_: None)
    with pair(config_of(), config_of(), patience_seconds=0.5) as both:
        assert both.complete("0", PROMPT) == expected("llama", PROMPT)
        assert both.decode.core.role.counters.retried == 1
        both.prefill.settle()


def test_a_role_is_refused_with_the_dry_executor():
    with pytest.raises(ConfigError, match="executor=dry: has no pages"):
        Running(config_of(executor="dry", transfer=TransferConfig("decode")))


def test_the_error_names_a_transfer_port_that_is_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"transfer_port=127.0.0.1:[0-9]+: cannot be listened at"):
            Running(config_of(transfer=TransferConfig("prefill", port=taken.getsockname()[1])))


@pytest.mark.parametrize(
    ("field", "value"), [("role", "both"), ("port", -1), ("block_bytes", 0), ("patience_seconds", 0)]
)
def test_the_error_names_an_invalid_value(field, value):
    with pytest.raises(ConfigError, match=str(value)):
        TransferConfig(**{"role": "decode", field: value})
