"""A peer that says what cannot be costs its own fetches, not the engine: prompts are then computed elsewhere."""

from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest
import zmq

from longspan.config import TransferConfig
from longspan.disaggregation.handshake import format_of
from longspan.disaggregation.layout_map import problem_of
from longspan.disaggregation.lock import LARGEST_MESSAGE, unlock
from longspan.disaggregation.messages import (
    Accepted,
    Broken,
    Ended,
    Have,
    Hello,
    Missing,
    PageBlock,
    PageRequest,
    Prefill,
    Release,
    ToDecode,
    ToReceiver,
    Welcome,
    encode,
)
from longspan.engine.setup import resolve
from longspan.errors import ConfigError
from longspan.plan.source import Part, Source
from tests.disaggregation.fake_peer import LIFE, fake_peer, with_part
from tests.disaggregation.pair import Running, config_of, expected, pair
from tests.oracle import prompt_of

PROMPT = tuple(prompt_of(100))
TOKEN = "a secret of some length"
NO_TEXT = b"\x81\xa4type\xa2\xff\xfe"
NESTED = b"\x82\xa1x" + b"\x91" * 5000 + b"\x01\xa4type\xa5Pulse"


@contextmanager
def decode_instance(**options):
    """Its patience is longer than any test: what is noticed is noticed because it is wrong."""
    running = Running(config_of(transfer=TransferConfig("decode", **{"patience_seconds": 600, **options})))
    try:
        yield running
    finally:
        running.close()


def assert_computed_elsewhere(limits=None, **answers):
    with decode_instance(**(limits or {})) as decode, fake_peer(decode.core.setup, **answers) as peer:
        decode.start("0", PROMPT, 8, (peer.address,))
        assert decode.result("0") == expected("llama", PROMPT)
        decode.start("1", PROMPT, 8)  # what was fetched is no part of the prefix cache
        assert decode.result("1") == expected("llama", PROMPT)
        assert peer.greetings == 1
        counters = decode.core.role.counters
        assert (counters.retried, counters.fetched) == (1, 0)
        decode.settle()


WELCOMES = {
    "no addresses": lambda source: replace(source, addresses=()),
    "a form of address that is not for others": lambda source: replace(source, addresses=("ipc:///tmp/longspan",)),
    "an address that is none": lambda source: replace(source, addresses=("tcp://nowhere",)),
    "a rank that is not there": lambda source: with_part(source, rank=7),
    "a shard of more than there are": lambda source: with_part(source, shard=3),
    "more heads than the model has": lambda source: with_part(source, heads=(0, 99)),
    "fewer layers than none": lambda source: with_part(source, layers=(-3, 99)),
    "text that is none": lambda _: NO_TEXT,
    "an endless nest": lambda _: NESTED,
}


@pytest.mark.parametrize("welcome", WELCOMES.values(), ids=WELCOMES.keys())
def test_a_welcome_that_cannot_be_ends_its_connection_only(welcome):
    assert_computed_elsewhere(welcome=welcome)


def test_a_prompt_that_is_accepted_twice_is_computed_elsewhere():
    assert_computed_elsewhere(
        accept=lambda number, request: [Accepted(number, request), Accepted(number, request + "again")]
    )


RANKS = {
    "positions in the wrong order": {"have": lambda request: Have(LIFE, request, [(50, 100), (0, 50)])},
    "runs of less than nothing": {"have": lambda request: Have(LIFE, request, [(9, 2)])},
    "bytes that are no message": {"have": lambda _: NO_TEXT},
    "a block that is too short": {"block": lambda zeros: zeros[:-1]},
    "a block of nothing": {"block": lambda _: b""},
}


@pytest.mark.parametrize("answers", RANKS.values(), ids=RANKS.keys())
def test_what_a_rank_sends_and_cannot_be_ends_its_fetch_only(answers):
    assert_computed_elsewhere(**answers)


def test_two_prompts_of_one_name_are_not_taken_for_each_other():
    with (
        decode_instance() as decode,
        fake_peer(
            decode.core.setup, have=lambda request: Have(LIFE, request, []),
            accept=lambda number, _: [Accepted(number, "same")],
        ) as peer,
    ):  # fmt: skip
        prompts = [tuple(prompt_of(100, seed)) for seed in range(2)]
        for number, prompt in enumerate(prompts):
            decode.start(str(number), prompt, 8, (peer.address,))
        for number, prompt in enumerate(prompts):
            assert decode.result(str(number)) == expected("llama", prompt)


def test_requests_go_on_with_a_good_peer_beside_a_bad_one():
    with pair(config_of(), config_of()) as both, fake_peer(both.decode.core.setup, block=lambda zeros: b"") as bad:
        both.decode.start("0", PROMPT, 8, (bad.address, both.prefill.address))
        assert both.decode.result("0") == expected("llama", PROMPT)
        assert both.decode.core.role.counters.fetched == both.decode.core.role.counters.retried == 1


def test_what_a_peer_sends_is_taken_if_its_form_is_right():
    with decode_instance() as decode, fake_peer(decode.core.setup) as peer:
        decode.start("0", PROMPT, 8, (peer.address,))
        assert decode.result("0") != expected("llama", PROMPT)  # so who may be a peer is to be guarded
        assert decode.core.role.counters.fetched == 1


def test_a_request_that_names_nobody_goes_to_the_configured_peers_in_turn():
    with pair(config_of(), config_of()) as both, decode_instance(prefill_peers=(both.prefill.address,)) as decode:
        for number, prompt in enumerate((PROMPT, tuple(prompt_of(100, seed=1)))):
            decode.start(str(number), prompt, 8)
            assert decode.result(str(number)) == expected("llama", prompt)
        assert decode.core.role.counters.fetched == 2


PARTS = (Part(0, 0, (0, 2), (0, 4)), Part(1, 1, (0, 2), (0, 4)))
ADDRESSES = ("tcp://a:1", "tcp://[::1]:2")


def test_a_source_that_holds_a_whole_model_on_every_shard_is_taken():
    assert problem_of(Source("x", ADDRESSES, PARTS), PARTS) is None


def test_a_source_of_which_one_shard_lacks_layers_is_not():
    lacking = (PARTS[0], replace(PARTS[1], layers=(0, 1)))
    assert "no rank of the shard holds KV head 0" in problem_of(Source("x", ADDRESSES, lacking), PARTS)


def test_a_peer_that_greets_and_stays_silent_is_waited_for_no_longer_than_the_patience():
    assert_computed_elsewhere({"patience_seconds": 0.5}, accept=lambda number, request: [], computes=False)


def test_a_peer_that_never_has_a_prompt_is_waited_for_no_longer_than_prompts_may_take():
    have = lambda request: Have(LIFE, request, [])  # noqa: E731
    assert_computed_elsewhere({"prompt_seconds": 0.5}, have=have, computes=False)


@contextmanager
def spoken_to(token=""):
    """A prefill instance and a socket that talks to it as a decode instance, or worse."""
    running = Running(config_of(transfer=TransferConfig("prefill", token=token)))
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        unlock(socket, token)
        socket.connect(running.address)
        yield running, socket
    finally:
        context.destroy(linger=0)
        running.close()


def answer(socket, wanted, kind=ToDecode):
    while socket.poll(20_000):
        found = msgspec.msgpack.decode(socket.recv_multipart()[0], type=kind)
        if isinstance(found, wanted):
            return found
    raise AssertionError(f"no {wanted}")


def turned_away(socket, address, data):
    """Connect and speak, until the other side has closed the connection."""
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    socket.connect(address)
    socket.send(data, copy=False)
    assert monitor.poll(20_000)
    socket.disable_monitor()
    monitor.close(linger=0)


def greeted(running, socket):
    socket.send(encode(Hello(format_of(running.core.setup))))
    return answer(socket, Welcome).source


def test_a_number_that_a_decode_instance_uses_twice_is_refused():
    with spoken_to() as (running, socket):
        greeted(running, socket)
        for _ in range(2):
            socket.send(encode(Prefill(1, list(PROMPT))))
        assert "in use" in answer(socket, Ended).reason
        socket.send(encode(Release(1)))
        running.settle()
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


@pytest.mark.parametrize("data", [NO_TEXT, NESTED, b""], ids=["no text", "nested", "nothing"])
def test_bytes_that_are_no_message_cost_a_prefill_instance_nothing(data):
    with spoken_to() as (running, socket):
        source = greeted(running, socket)
        rank = socket.context.socket(zmq.DEALER)
        rank.connect(source.addresses[0])
        for line in (socket, rank):
            line.send(data)
        rank.send(encode(PageRequest(source.epoch, 3, "nobody's", (0, 1), (0, 1), ((0, 1),))))
        assert answer(rank, Missing, ToReceiver).block == 3  # so the rank has read what came before
        greeted(running, socket)
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


def test_pages_of_a_users_request_are_given_to_nobody():
    with spoken_to() as (running, socket):
        source = greeted(running, socket)
        rank = socket.context.socket(zmq.DEALER)
        rank.connect(source.addresses[0])
        running.pause_when = lambda: any(s.computed >= len(PROMPT) for s in running.core.scheduler.running)
        running.start("0", PROMPT, 8)
        running.wait_until(running.pause_when)
        rank.send(encode(PageRequest(source.epoch, 3, "0", (0, 1), (0, 1), ((0, 50),))))
        assert answer(rank, (PageBlock, Missing), ToReceiver) == Missing(3)
        running.pause_when = lambda: False
        assert running.result("0") == expected("llama", PROMPT)


def held_prompt(running, socket):
    """The source, the name of a computed prompt that is held for this socket, and a connection to a rank's pages."""
    source = greeted(running, socket)
    socket.send(encode(Prefill(1, list(PROMPT))))
    request = answer(socket, Accepted).request
    rank = socket.context.socket(zmq.DEALER)
    rank.connect(source.addresses[0])
    running.wait_until(lambda: request in running.core.scheduler._held)
    return source, request, rank


def test_a_question_that_names_a_token_twice_is_not_answered():
    with spoken_to() as (running, socket):
        source, request, rank = held_prompt(running, socket)
        rank.send(encode(PageRequest(source.epoch, 3, request, (0, 1), (0, 1), ((0, 50), (0, 50)))))
        assert answer(rank, Missing, ToReceiver).block == 3


@pytest.mark.parametrize("token", ["", "another secret of that kind"], ids=["none", "another"])
def test_who_has_not_the_token_is_not_heard(token):
    with spoken_to(TOKEN) as (running, friend):
        stranger = friend.context.socket(zmq.DEALER)
        unlock(stranger, token)
        turned_away(stranger, running.address, encode(Hello(format_of(running.core.setup))))
        assert not stranger.poll(0)
        greeted(running, friend)


def test_instances_with_one_token_work_together():
    with pair(config_of(), config_of(), token=TOKEN) as both:
        assert both.complete("0", PROMPT) == expected("llama", PROMPT)
        both.assert_fetched(len(PROMPT) - 1)


def test_a_decode_instance_with_another_token_computes_for_itself_and_says_so(caplog):
    with pair(config_of(), config_of(), token=TOKEN) as both, decode_instance(token=TOKEN[::-1]) as decode:
        decode.start("0", PROMPT, 8, (both.prefill.address,))
        assert decode.result("0") == expected("llama", PROMPT)
        assert decode.core.role.counters.fetched == 0
    assert "it has another transfer token" in caplog.text


def test_what_a_rank_tells_its_driver_cannot_be_said_by_a_peer():
    with spoken_to() as (running, socket):
        source = greeted(running, socket)
        socket.send_multipart([source.epoch.encode(), encode(Broken(0, "so they say"))])
        socket.send(encode(Broken(0, "so they say")))
        greeted(running, socket)  # so the instance has read what came before
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


def test_pages_of_another_instances_prompt_cannot_be_had_by_counting():
    with spoken_to() as (running, owner):
        source, request, rank = held_prompt(running, owner)
        for number in range(8):
            rank.send(encode(PageRequest(source.epoch, number, f"peer-{number}", (0, 1), (0, 1), ((0, 50),))))
            assert answer(rank, (PageBlock, Missing), ToReceiver) == Missing(number)
        rank.send(encode(PageRequest(source.epoch, 8, request, (0, 1), (0, 1), ((0, 50),))))
        assert answer(rank, (PageBlock, Missing), ToReceiver) == PageBlock(8)


@pytest.mark.parametrize(("listener", "largest"), [("driver", LARGEST_MESSAGE), ("rank", 1 << 22)])
def test_who_sends_too_large_a_message_is_cut_off(listener, largest):
    with spoken_to() as (running, socket):
        source = greeted(running, socket)
        stranger = socket.context.socket(zmq.DEALER)
        turned_away(stranger, {"driver": running.address, "rank": source.addresses[0]}[listener], bytes(largest + 1))
        running.start("0", PROMPT, 8)
        assert running.result("0") == expected("llama", PROMPT)


def test_a_decode_instance_listens_for_nobody():
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
def test_peers_and_tokens_that_cannot_be_are_named(values, problem):
    with pytest.raises(ConfigError, match=problem):
        TransferConfig(**values)


def test_the_token_is_told_to_nobody():
    token = "0123456789abcdef"
    config = config_of(transfer=TransferConfig("decode", token=token))
    assert token not in repr(config)
    with decode_instance(token=token) as decode:
        assert token not in str(msgspec.json.encode(decode.core.setup.config))  # the ranks' configuration
        assert token not in str(msgspec.json.encode(decode.core.role.card))
    assert resolve(config).config.transfer.token == token  # the server's own has it
