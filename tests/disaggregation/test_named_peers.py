"""Which prefill instances a client's request to a decode instance may name: configured ones, and signed addresses."""

import json
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from longspan.config import TransferConfig
from longspan.disaggregation.signature import PREFILL_HEADER, SIGNATURE_HEADER, VALID_SECONDS, sign
from longspan.engine.setup import resolve
from tests.disaggregation.fake_peer import fake_peer
from tests.disaggregation.pair import Running, config_of
from tests.server.running import ascii_folder, expected, running

TOKEN = "a secret of some length"
PROMPT = "the quick brown fox jumps over the lazy dog, " * 3


@contextmanager
def prefill_instance(token=""):
    side = Running(replace(config_of(transfer=TransferConfig("prefill", token=token)), model=ascii_folder()))
    try:
        yield side
    finally:
        side.close()


@pytest.fixture(scope="module")
def decode():
    """A decode instance's server with a token and without configured prefill instances."""
    with running(transfer=TransferConfig("decode", token=TOKEN)) as server:
        yield server


@pytest.fixture
def hostile(decode):
    """A prefill instance of an attacker, which sends zeros for KV."""
    with fake_peer(decode.service.engine.setup) as peer:
        yield peer


def ask(server, prompt, address, signature=None):
    """Request a completion and name a prefill instance. `signature` makes the signature from the body."""
    body = json.dumps({"prompt": prompt, "max_tokens": 12, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", PREFILL_HEADER: address}
    if signature is not None:
        headers[SIGNATURE_HEADER] = signature(body)
    return server.client.post("/v1/completions", content=body, headers=headers)


def fetched(server) -> int:
    transfer = server.client.get("/internal/peer").json()["transfer"]
    return transfer["fetched"] if transfer else 0  # None before the first step


def test_an_address_from_a_client_is_refused_and_never_connected():
    with running(transfer=TransferConfig("decode")) as server, fake_peer(server.service.engine.setup) as peer:
        answer = ask(server, PROMPT, peer.address)
        assert server.complete(PROMPT, 12)["choices"][0]["text"] == expected(PROMPT, 12)
        assert answer.status_code == 403, answer.text
        assert (peer.hellos, server.engine.restarts) == (0, 0)
        error = answer.json()["error"]
        assert error["param"] == PREFILL_HEADER
        assert "start the decode instance with --prefill-peers" in error["message"]
        assert "the same --transfer-token-file" in error["message"]


def test_pages_are_fetched_from_a_signed_address(decode):
    with prefill_instance(TOKEN) as side:
        before = fetched(decode)
        answer = ask(decode, "s" + PROMPT, side.address, lambda body: sign(TOKEN, [side.address], body, time.time()))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected("s" + PROMPT, 12)
        assert fetched(decode) == before + 1


@pytest.mark.parametrize(
    ("signed", "problem"),
    [
        (
            lambda address, body: sign(TOKEN, [address], body, time.time() - VALID_SECONDS - 60),
            "has a signature that expired",
        ),
        (lambda address, body: sign("another secret of that kind", [address], body, time.time()), "no valid signature"),
        (lambda address, body: sign(TOKEN, ["tcp://127.0.0.1:1"], body, time.time()), "no valid signature"),
        (lambda address, body: sign(TOKEN, [address], body + b" ", time.time()), "no valid signature"),
        (lambda address, body: "", "no valid signature"),
    ],
    ids=["expired", "another token", "another address", "another body", "none"],
)
def test_an_address_without_a_valid_signature_is_refused(decode, hostile, signed, problem):
    answer = ask(decode, "o" + PROMPT, hostile.address, lambda body: signed(hostile.address, body))
    assert answer.status_code == 403
    assert problem in answer.json()["error"]["message"]
    assert hostile.hellos == 0
    assert decode.complete("o" + PROMPT, 12)["choices"][0]["text"] == expected("o" + PROMPT, 12)


def test_configured_peers_are_used_and_an_invalid_one_does_not_restart_the_core():
    setup = resolve(replace(config_of(), model=ascii_folder()))
    with (
        prefill_instance() as good,
        fake_peer(setup, welcome=lambda source: replace(source, addresses=())) as bad,
        running(transfer=TransferConfig("decode", prefill_peers=(bad.address, good.address))) as server,
    ):
        answer = ask(server, PROMPT, bad.address)
        assert answer.json()["choices"][0]["text"] == expected(PROMPT, 12)
        assert (bad.hellos, server.engine.restarts, fetched(server)) == (1, 0, 0)
        assert server.complete("n" + PROMPT, 12)["choices"][0]["text"] == expected("n" + PROMPT, 12)
        assert ask(server, "m" + PROMPT, good.address).status_code == 200
        assert (server.engine.restarts, fetched(server)) == (0, 2)
        assert ask(server, PROMPT, f"{good.address},tcp://127.0.0.1:1").status_code == 403
