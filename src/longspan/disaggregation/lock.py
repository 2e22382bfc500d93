"""The lock between instances: a prefill instance hears only those who have its transfer token, over CurveZMQ.

It owns how the token becomes keys; it must not know what is said behind them.
"""

from __future__ import annotations

import hmac
from hashlib import sha256

import zmq
from zmq.utils import z85

from longspan.config import require

LARGEST_MESSAGE = 1 << 26
"""Bytes of one message between instances, so tokens of a prompt: twelve million. Who sends more is cut off."""


def lock(socket: zmq.Socket[bytes], token: str) -> None:
    """For the side that listens, before it does; without a token everybody is heard."""
    socket.maxmsgsize = LARGEST_MESSAGE
    if token:
        socket.curve_server = True
        socket.curve_secretkey = _secret_key(token)


def unlock(socket: zmq.Socket[bytes], token: str) -> None:
    """For the side that connects, before it does.

    The first message of the handshake can only be made with the listener's public key. Nobody is told that key: it
    comes from the token as well, so whoever has one has the other, and a pair of keys of its own proves no more.
    """
    socket.maxmsgsize = LARGEST_MESSAGE
    if token:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = zmq.curve_public(_secret_key(token))


def _secret_key(token: str) -> bytes:
    require(
        bool(zmq.has("curve")), "transfer_token", "(hidden)", "needs a ZeroMQ with CURVE",
        "install pyzmq from its wheel, or ZeroMQ with libsodium",
    )  # fmt: skip
    return z85.encode(hmac.new(token.encode(), b"longspan: key of a prefill instance", sha256).digest())
