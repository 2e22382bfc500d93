"""Which prefill instances a request may name: configured ones, or any addresses with a router's signature.

It owns the names of the headers, the signature and its check; pure, it must not read a clock, a file or a socket.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from longspan.config import TransferConfig
from longspan.config.addresses import is_address
from longspan.errors import RequestError

PREFILL_HEADER = "x-longspan-prefill"
"""Header of a request to a decode instance: addresses of prefill instances, in the order in which to try them."""

SIGNATURE_HEADER = "x-longspan-prefill-signature"
"""Header with the time until which the addresses may be used, and an HMAC that is made with the transfer token."""

VALID_SECONDS = 300
"""How long a signature is valid: the time in which a body is sent, and the difference of the clocks, must be less."""

_MAX_SHOWN = 80  # characters of a header in an error


def sign(token: str, addresses: Sequence[str], body: bytes, now: float) -> str:
    """The signature for a request with this body that names `addresses`; `now` is in seconds since the epoch (Unix)."""
    expires = int(now) + VALID_SECONDS
    return f"{expires}.{_digest(token, expires, body, addresses)}"


def named_peers(config: TransferConfig, named: str, signature: str, body: bytes, now: float) -> tuple[str, ...]:
    """The addresses in the header `named`. Raises `RequestError` if the request may not name them.

    If all of them are in `prefill_peers` no signature is needed. Otherwise the signature must have been made with the
    transfer token for these addresses and this body.
    """
    addresses = tuple(dict.fromkeys(filter(None, named.replace(" ", "").split(","))))
    if all(address in config.prefill_peers for address in addresses):
        return addresses
    if not config.token:
        raise _refused(
            named, "names a prefill instance that is not in this decode instance's configuration",
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
            named, f"has a signature that expired {now - until:.0f} s ago",
            "send the request again; if that does not help, set the clocks of router and decode instance",
        )  # fmt: skip
    if not all(map(is_address, addresses)):
        raise _refused(
            named, "has an address that is not of the form tcp://HOST:PORT", "correct the router's --prefill"
        )
    return addresses


def token_digest(token: str) -> str:
    """A digest by which two tokens can be compared without revealing them; empty for no token."""
    return hmac.new(token.encode(), b"longspan: which transfer token", sha256).hexdigest()[:16] if token else ""


def _digest(token: str, expires: int, body: bytes, addresses: Sequence[str]) -> str:
    """HMAC-SHA256 of everything that the signature covers, in hexadecimal."""
    lines = ("longspan: prefill instances of a request", str(expires), sha256(body).hexdigest(), ",".join(addresses))
    return hmac.new(token.encode(), "\n".join(lines).encode(), sha256).hexdigest()


def _refused(named: str, problem: str, remedy: str) -> RequestError:
    shown = named if len(named) <= _MAX_SHOWN else f"{named[: _MAX_SHOWN - 1]}…"
    return RequestError(PREFILL_HEADER, repr(shown), problem, remedy)
