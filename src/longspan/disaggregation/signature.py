"""Which prefill instances a request may name: those of the configuration, or any that a router has signed.

It owns the headers' names, the signature and its check; pure, it must not read a clock, a file or a socket.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from longspan.config import TransferConfig
from longspan.config.addresses import is_address
from longspan.errors import RequestError

PREFILL_HEADER = "x-longspan-prefill"
"""Of a request to a decode instance: addresses of prefill instances, to be asked in this order."""

SIGNATURE_HEADER = "x-longspan-prefill-signature"
"""Made by whoever has the transfer token: until when the addresses may be used, and an HMAC of that and of them."""

VALID_SECONDS = 300
"""Covers the time a body takes to be sent, and clocks that differ."""

_SHOWN = 80  # characters of a header


def sign(token: str, addresses: Sequence[str], body: bytes, now: float) -> str:
    """The signature under which a request with this `body` may name `addresses`; `now` is the time of day."""
    expires = int(now) + VALID_SECONDS
    return f"{expires}.{_digest(token, expires, body, addresses)}"


def named_peers(config: TransferConfig, named: str, signature: str, body: bytes, now: float) -> tuple[str, ...]:
    """The addresses in a header, if the request may name them. Raises `RequestError`.

    Those in `prefill_peers` need no signature; else all of them need one, made with the token for this very body.
    """
    addresses = tuple(dict.fromkeys(filter(None, named.replace(" ", "").split(","))))
    if all(address in config.prefill_peers for address in addresses):
        return addresses
    if not config.token:
        raise _refused(
            named, "names a prefill instance that this decode instance was not told of",
            "leave the header out; or start the decode instance with --prefill-peers, or it and the router with the "
            "same --transfer-token-file",
        )  # fmt: skip
    expires, _, digest = signature.partition(".")
    until = int(expires) if expires.isascii() and expires.isdecimal() and len(expires) <= len(str(1 << 40)) else 0
    if not hmac.compare_digest(digest.encode(), _digest(config.token, until, body, addresses).encode()):
        raise _refused(
            named, f"has no valid signature in {SIGNATURE_HEADER}",
            "leave the header out; or start router and decode instance with the same --transfer-token-file",
        )  # fmt: skip
    if now > until:
        raise _refused(
            named, f"was signed for a time that is over since {now - until:.0f} s",
            "send the request again; if that does not help, set the clocks of router and decode instance",
        )  # fmt: skip
    if not all(map(is_address, addresses)):
        raise _refused(named, "holds something else than tcp://HOST:PORT", "correct the router's --prefill")
    return addresses


def token_digest(token: str) -> str:
    """Tells two tokens apart without telling either; '' for none."""
    return hmac.new(token.encode(), b"longspan: which transfer token", sha256).hexdigest()[:16] if token else ""


def _digest(token: str, expires: int, body: bytes, addresses: Sequence[str]) -> str:
    lines = ("longspan: prefill instances of a request", str(expires), sha256(body).hexdigest(), ",".join(addresses))
    return hmac.new(token.encode(), "\n".join(lines).encode(), sha256).hexdigest()


def _refused(named: str, problem: str, remedy: str) -> RequestError:
    shown = named if len(named) <= _SHOWN else f"{named[: _SHOWN - 1]}…"
    return RequestError(PREFILL_HEADER, repr(shown), problem, remedy)
