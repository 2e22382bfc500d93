"""Which prefill instances a request may name: configured ones, and addresses with a router's signature."""

import pytest

from longspan.config import TransferConfig
from longspan.disaggregation.signature import VALID_SECONDS, named_peers, sign, token_digest
from longspan.errors import RequestError

TOKEN, OTHER = "a secret of some length", "another secret of that kind"
PEERS = ("tcp://a:7001", "tcp://10.0.0.1:7002")
BODY = b'{"prompt": "p"}'
NOW = 1_700_000_000.4
SIGNED = TransferConfig("decode", token=TOKEN)
LISTED = TransferConfig("decode", prefill_peers=PEERS)


def named(config, addresses=PEERS, signature=None, body=BODY, now=NOW):
    signature = sign(TOKEN, PEERS, BODY, NOW) if signature is None else signature
    return named_peers(config, ",".join(addresses), signature, body, now)


def test_signed_addresses_are_accepted_until_the_signature_expires():
    assert named(SIGNED) == named(SIGNED, now=NOW + VALID_SECONDS - 1) == PEERS


def test_configured_addresses_need_no_signature():
    assert named(LISTED, signature="") == PEERS
    assert named(LISTED, PEERS[1:], signature="") == PEERS[1:]


def test_a_repeated_address_is_removed():
    assert named(LISTED, (*PEERS, *PEERS), signature="") == PEERS


@pytest.mark.parametrize(
    "change",
    [
        {"addresses": ("tcp://evil:1",)},
        {"addresses": (*PEERS, "tcp://evil:1")},
        {"addresses": PEERS[::-1]},
        {"body": b'{"prompt": "q"}'},
        {"signature": ""},
        {"signature": "nonsense"},
        {"signature": "²²²²." + "0" * 64},
        {"signature": "9" * 5000 + "." + "0" * 64},
        {"signature": sign(OTHER, PEERS, BODY, NOW)},
        {"signature": f"{int(NOW) + 10**6}.{sign(TOKEN, PEERS, BODY, NOW).partition('.')[2]}"},
    ],
    ids=str,
)
def test_a_signature_for_anything_else_is_refused(change):
    with pytest.raises(RequestError, match=r"no valid signature.*same --transfer-token-file"):
        named(SIGNED, **change)


def test_an_expired_signature_is_refused():
    with pytest.raises(RequestError, match=r"expired 2 s ago.*clocks"):
        named(SIGNED, now=NOW + VALID_SECONDS + 2)


def test_without_a_token_only_configured_addresses_are_accepted():
    with pytest.raises(RequestError, match="start the decode instance with --prefill-peers"):
        named(TransferConfig("decode"))
    with pytest.raises(RequestError, match="not in this decode instance's configuration"):
        named(LISTED, (*PEERS, "tcp://evil:1"))


@pytest.mark.parametrize(
    "address", ["ipc:///tmp/x", "http://a:1", "tcp://a", "tcp://a:0", "tcp://a:70000", "tcp://a;b:1"]
)
def test_a_signed_address_that_is_not_a_tcp_address_is_refused(address):
    with pytest.raises(RequestError, match="not of the form tcp://HOST:PORT"):
        named(SIGNED, (address,), sign(TOKEN, (address,), BODY, NOW))


def test_an_error_shows_only_the_beginning_of_a_long_header():
    with pytest.raises(RequestError) as refused:
        named(SIGNED, ("x" * 10_000,))
    assert len(str(refused.value)) < 400


def test_different_tokens_have_different_digests():
    assert token_digest(TOKEN) == token_digest(TOKEN) != token_digest(OTHER)
    assert token_digest("") == ""
