"""Addresses at which instances and their ranks listen for each other, as text.

It owns their format; it must not open connections.
"""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"tcp://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback one, which only this machine reaches."""
    return host in ("localhost", "::1") or host.startswith("127.")


def is_address(text: str) -> bool:
    """Whether the text is `tcp://HOST:PORT`. ZeroMQ knows other forms, but other instances may not name them."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[1]) < 1 << 16


def reachable(address: str, known: str) -> str:
    """`address` with the host of `known` in place of 0.0.0.0.

    An instance known as `tcp://host:4000` that names `tcp://0.0.0.0:5000` is reached at `tcp://host:5000`.
    """
    host = known.removeprefix("tcp://").rpartition(":")[0]
    return address.replace("//0.0.0.0:", f"//{host}:")
