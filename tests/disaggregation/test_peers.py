"""Invalid messages of a peer fail its own fetches, not the engine: the prompts are computed elsewhere."""

from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest
import zmq

from longspan.config import TransferConfig
from longspan.disaggregation.authentication import LARGEST_MESSAGE, present_token
from longspan.disaggregation.handshake import format_of
from longspan.disaggregation.layout_map import problem_of
from longspan.disaggregation.messages import (
    Accepted,
    Available,
    Hello,
    Missing,
    PageBlock,
    PageRequest,
    Prefill,
    PrefillFailed,
    Release,
    ToDecode,
    ToReceiver,
    TransferFailed,
    Welcome,
    encode,
)
from longspan.engine.setup import resolve
from longspan.errors import ConfigError
from longspan.plan.source import Part, Source
from tests.disaggregation.fake_peer import EPOCH, fake_peer, with_part
from tests.disaggregation.pair import Running, config_of, expected, pair
from tests.oracle import prompt_of

PROMPT = tuple(prompt_of(100))
TOKEN = "a secret of some length"
NOT_UTF8 = b"\x81\xa4type\xa2\xff\xfe"
NESTED = b"\x82\xa1x" + b"\x91" * 5000 + b"\x01\xa4type\xa4Ping"


@contextmanager
def decode_instance(**options):
    """Its timeouts are longer than any test, so that a failure is detected by its message and not by the time."""
    running = Running(config_of(transfer=TransferConfig("decode", **{"patience_seconds": 600, **options})))
    try:
        yield running
    finally:
        running.close()


def assert_computed_elsewhere(limits=None, **answers):
    with decode_instance(**(limits or {})) as decode, fake_peer(decode.core.setup, **answers) as peer:
        decode.start("0", PROMPT, 8, (peer.address,))
        assert decode.result("0") == expected("llama", PROMPT)
        decode.start("1", PROMPT, 8)  # what was fetched is not in the prefix cache
        assert decode.result("1") == expected("llama", PROMPT)
        assert peer.hellos == 1
        counters = decode.core.role.counters
        assert (counters.retried, counters.fetched) == (1, 0)
        decode.settle()


WELCOMES = {
    "no addresses": lambda source: replace(source, addresses=()),
    "an address of this host only": lambda source: replace(source, addresses=("ipc:///tmp/longspan",)),
    "an invalid address": lambda source: replace(source, addresses=("tcp://nowhere",)),
    "an unknown rank": lambda source: with_part(source, rank=7),
    "an unknown shard": lambda source: with_part(source, shard=3),
    "more heads than the model has": lambda source: with_part(source, heads=(0, 99)),
    "a negative layer": lambda source: with_part(source, layers=(-3, 99)),
    "text that is not UTF-8": lambda _: NOT_UTF8,
    "deeply nested arrays": lambda _: NESTED,
}


@pytest.mark.parametrize("welcome", WELCOMES.values(), ids=WELCOMES.keys())
def test_an_invalid_welcome_ends_only_its_connection(welcome):
    assert_computed_elsewhere(welcome=welcome)


def test_a_prompt_that_is_accepted_twice_is_computed_elsewhere():
    assert_computed_elsewhere(
        accept=lambda number, request: [Accepted(number, request), Accepted(number, request + "again")]
    )


RANKS = {
    "positions in the wrong order": {"available": lambda request: Available(EPOCH, request, [(50, 100), (0, 50)])},
    "a run that ends before it starts": {"available": lambda request: Available(EPOCH, request, [(9, 2)])},
    "bytes that are not a message": {"available": lambda _: NOT_UTF8},
    "a block that is too short": {"block": lambda zeros: zeros[:-1]},
    "an empty block": {"block": lambda _: b""},
}


@pytest.mark.parametrize("answers", RANKS.values(), ids=RANKS.keys())
def test_an_invalid_message_of_a_rank_ends_only_its_fetch(answers):
    assert_computed_elsewhere(**answers)


def test_two_prompts_with_the_same_id_are_not_confused():
    with (
        decode_instance() as decode,
        fake_peer(
            decode.core.setup, available=lambda request: Available(EPOCH, request, []),
            accept=lambda number, _: [Accepted(number, "same")],
        ) as peer,
    ):  # fmt: skip
        prompts = [tuple(prompt_of(100, seed)) for seed in range(2)]
        for number, prompt in enumerate(prompts):
            decode.start(str(number), prompt, 8, (peer.address,))
        for number, prompt in enumerate(prompts):
            assert decode.result(str(number)) == expected("llama", prompt)


def test_a_request_is_retried_at_a_valid_peer_after_an_invalid_one():
    with pair(config_of(), config_of()) as both, fake_peer(both.decode.core.setup, block=lambda zeros: b"") as bad:
        both.decode.start("0", PROMPT, 8, (bad.address, both.prefill.address))
        assert both.decode.result("0") == expected("llama", PROMPT)
        assert both.decode.core.role.counters.fetched == both.decode.core.role.counters.retried == 1


def test_a_valid_block_is_stored_whatever_its_values():
    with decode_instance() as decode, fake_peer(decode.core.setup) as peer:
        decode.start("0", PROMPT, 8, (peer.address,))
        assert decode.result("0") != expected("llama", PROMPT)  # so only trusted peers may be used
        assert decode.core.role.counters.fetched == 1


def test_a_request_without_addresses_uses_the_configured_peers_in_turn():
    with pair(config_of(), config_of()) as both, decode_instance(prefill_peers=(both.prefill.address,)) as decode:
        for number, prompt in enumerate((PROMPT, tuple(prompt_of(100, seed=1)))):
            decode.start(str(number), prompt, 8)
            assert decode.result(str(number)) == expected("llama", prompt)
        assert decode.core.role.counters.fetched == 2


PARTS = (Part(0, 0, (0, 2), (0, 4)), Part(1, 1, (0, 2), (0, 4)))
ADDRESSES = ("tcp://a:1", "tcp://[::1]:2")


def test_a_source_with_the_whole_model_on_every_shard_is_accepted():
    assert problem_of(Source("x", ADDRESSES, PARTS), PARTS) is None


def test_a_source_with_a_shard_that_lacks_layers_is_refused():
    lacking = (PARTS[0], replace(PARTS[1], layers=(0, 1)))
    assert "no rank of the shard holds KV head 0" in problem_of(Source("x", ADDRESSES, lacking), PARTS)


def test_a_peer_that_does_not_accept_a_prompt_is_given_up_after_patience_seconds():
    assert_computed_elsewhere({"patience_seconds": 0.5}, accept=lambda number, request: [], computes=False)


def test_a_peer_that_never_computes_a_prompt_is_given_up_after_prompt_seconds():
    available = lambda request: Available(EPOCH, request, [])  # noqa: E731
    assert_computed_elsewhere({"prompt_seconds": 0.5}, available=available, computes=False)


def test_pages_of_a_prompt_that_its_peer_never_reports_as_computed_are_not_used():
    assert_computed_elsewhere({"prompt_seconds": 0.5}, computes=False)


@contextmanager
def prefill_instance(token=""):
    """A prefill instance, and a socket on which a test sends it the messages of a decode instance, or others."""
    running = Running(config_of(transfer=TransferConfig("prefill", token=token)))
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        present_token(socket, token)
        socket.connect(running.address)
        yield running, socket
    finally:
        context.destroy(linger=0)
        running.close()


def reply_of(socket, wanted, kind=ToDecode):
    while socket.poll(20_000):
        found = msgspec.msgpack.decode(socket.recv_multipart()[0], type=kind)
        if isinstance(found, wanted):
            return found
    raise AssertionError(f"no {wanted}")


def assert_disconnected(socket, address, data):
    """Connect and send; the other side closes the connection."""
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    socket.connect(address)
    socket.send(data, copy=False)
    assert monitor.poll(20_000)
    socket.disable_monitor()
    monitor.close(linger=0)


def welcomed(running, socket):
    socket.send(encode(Hello(format_of(running.core.setup))))
    return reply_of(socket, Welcome).source


def test_a_prompt_whose_number_is_in_use_is_refused():
    with prefill_instance() as (running, socket):
        welcomed(running, socket)
        for _ in range(2):
            socket.send(encode(Prefill(1, list(PROMPT))))
        assert "in use" in reply_of(socket, PrefillFailed).reason
        socket.send(encode(Release(1)))
        running.settle()
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


@pytest.mark.parametrize("data", [NOT_UTF8, NESTED, b""], ids=["not UTF-8", "nested", "empty"])
def test_a_prefill_instance_ignores_invalid_bytes(data):
    with prefill_instance() as (running, socket):
        source = welcomed(running, socket)
        rank = socket.context.socket(zmq.DEALER)
        rank.connect(source.addresses[0])
        for connection in (socket, rank):
            connection.send(data)
        rank.send(encode(PageRequest(source.epoch, 3, "unknown", (0, 1), (0, 1), ((0, 1),))))
        assert reply_of(rank, Missing, ToReceiver).block == 3  # so the rank has read the bytes before
        welcomed(running, socket)
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


def test_pages_of_a_users_request_are_not_sent():
    with prefill_instance() as (running, socket):
        source = welcomed(running, socket)
        rank = socket.context.socket(zmq.DEALER)
        rank.connect(source.addresses[0])
        running.pause_when = lambda: any(s.computed >= len(PROMPT) for s in running.core.scheduler.running)
        running.start("0", PROMPT, 8)
        running.wait_until(running.pause_when)
        rank.send(encode(PageRequest(source.epoch, 3, "0", (0, 1), (0, 1), ((0, 50),))))
        assert reply_of(rank, (PageBlock, Missing), ToReceiver) == Missing(3)
        running.pause_when = lambda: False
        assert running.result("0") == expected("llama", PROMPT)


def held_prompt(running, socket):
    """The source, the id of a computed prompt that is held for this socket, and a connection to a page sender."""
    source = welcomed(running, socket)
    socket.send(encode(Prefill(1, list(PROMPT))))
    request = reply_of(socket, Accepted).request
    rank = socket.context.socket(zmq.DEALER)
    rank.connect(source.addresses[0])
    running.wait_until(lambda: request in running.core.scheduler._held)
    return source, request, rank


def test_a_page_request_that_names_a_token_twice_is_refused():
    with prefill_instance() as (running, socket):
        source, request, rank = held_prompt(running, socket)
        rank.send(encode(PageRequest(source.epoch, 3, request, (0, 1), (0, 1), ((0, 50), (0, 50)))))
        assert reply_of(rank, Missing, ToReceiver).block == 3


@pytest.mark.parametrize("token", ["", "another secret of that kind"], ids=["none", "another"])
def test_a_peer_without_the_token_cannot_connect(token):
    with prefill_instance(TOKEN) as (running, known):
        stranger = known.context.socket(zmq.DEALER)
        present_token(stranger, token)
        assert_disconnected(stranger, running.address, encode(Hello(format_of(running.core.setup))))
        assert not stranger.poll(0)
        welcomed(running, known)


def test_instances_with_the_same_token_work_together():
    with pair(config_of(), config_of(), token=TOKEN) as both:
        assert both.complete("0", PROMPT) == expected("llama", PROMPT)
        both.assert_fetched(len(PROMPT) - 1)


def test_a_decode_instance_with_another_token_computes_prompts_itself_and_logs_why(caplog):
    with pair(config_of(), config_of(), token=TOKEN) as both, decode_instance(token=TOKEN[::-1]) as decode:
        decode.start("0", PROMPT, 8, (both.prefill.address,))
        assert decode.result("0") == expected("llama", PROMPT)
        assert decode.core.role.counters.fetched == 0
    assert "it has another transfer token" in caplog.text


def test_a_peer_cannot_send_the_messages_of_a_rank():
    with prefill_instance() as (running, socket):
        source = welcomed(running, socket)
        socket.send_multipart([source.epoch.encode(), encode(TransferFailed(0, "from a peer"))])
        socket.send(encode(TransferFailed(0, "from a peer")))
        welcomed(running, socket)  # so the instance has read the messages before
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


def test_a_prompts_pages_are_not_sent_to_a_peer_that_guesses_ids():
    with prefill_instance() as (running, owner):
        source, request, rank = held_prompt(running, owner)
        for number in range(8):
            rank.send(encode(PageRequest(source.epoch, number, f"peer-{number}", (0, 1), (0, 1), ((0, 50),))))
            assert reply_of(rank, (PageBlock, Missing), ToReceiver) == Missing(number)
        rank.send(encode(PageRequest(source.epoch, 8, request, (0, 1), (0, 1), ((0, 50),))))
        assert reply_of(rank, (PageBlock, Missing), ToReceiver) == PageBlock(8)


@pytest.mark.parametrize(("listener", "largest"), [("driver", LARGEST_MESSAGE), ("rank", 1 << 22)])
def test_a_peer_that_sends_too_large_a_message_is_disconnected(listener, largest):
    with prefill_instance() as (running, socket):
        source = welcomed(running, socket)
        stranger = socket.context.socket(zmq.DEALER)
        assert_disconnected(
            stranger, {"driver": running.address, "rank": source.addresses[0]}[listener], bytes(largest + 1)
        )
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


def test_a_decode_instance_opens_no_transfer_port():
    with decode_instance() as decode:
        assert decode.address == ""


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"role": "decode", "prefill_peers": ("http://a:1",)}, "is not a transfer address"),
        ({"role": "decode", "prefill_peers": ("ipc:///tmp/a",)}, "is not a transfer address"),
        ({"role": "prefill", "prefill_peers": ("tcp://a:1",)}, "has no effect on a prefill instance"),
        ({"role": "decode", "token": "short"}, "is too short"),
    ],
)
def test_invalid_peers_and_tokens_are_refused(values, problem):
    with pytest.raises(ConfigError, match=problem):
        TransferConfig(**values)


def test_the_token_is_in_no_message_and_no_repr():
    token = "0123456789abcdef"
    config = config_of(transfer=TransferConfig("decode", token=token))
    assert token not in repr(config)
    with decode_instance(token=token) as decode:
        assert token not in str(msgspec.json.encode(decode.core.setup.config))  # the ranks' configuration
        assert token not in str(msgspec.json.encode(decode.core.role.info))
    assert resolve(config).config.transfer.token == token  # the server's own has it
