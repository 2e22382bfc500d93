"""Authentication of connections between instances with the transfer token, over CurveZMQ.

It owns how keys are derived from the token; it must not know which messages are sent.
"""

from __future__ import annotations

import hmac
from hashlib import sha256

import zmq
from zmq.utils import z85

from longspan.config import require

LARGEST_MESSAGE = 1 << 26
"""The most bytes of one message between instances, enough for a prompt of twelve million tokens.

ZeroMQ closes the connection of a peer that sends a larger one.
"""


def require_token(socket: zmq.Socket[bytes], token: str) -> None:
    """Make a listening socket accept only peers that have the token, or every peer if the token is empty.

    Call it before `bind`.
    """
    socket.maxmsgsize = LARGEST_MESSAGE
    if token:
        socket.curve_server = True
        socket.curve_secretkey = _secret_key(token)


def present_token(socket: zmq.Socket[bytes], token: str) -> None:
    """Make a connecting socket prove that it has the token. Call it before `connect`.

    A CURVE handshake succeeds only if the client knows the server's public key. That key is derived from the token and
    never sent, so knowing it proves that the client has the token. The client's own key pair is random, because the
    server does not check it.
    """
    socket.maxmsgsize = LARGEST_MESSAGE
    if token:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = zmq.curve_public(_secret_key(token))


def _secret_key(token: str) -> bytes:
    """The secret CURVE key of a listening socket, as 40 characters of Z85."""
    require(
        bool(zmq.has("curve")), "transfer_token", "(hidden)", "needs a ZeroMQ with CURVE",
        "install pyzmq from its wheel, or ZeroMQ with libsodium",
    )  # fmt: skip
    return z85.encode(hmac.new(token.encode(), b"longspan: key of a prefill instance", sha256).digest())
