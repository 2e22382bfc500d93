"""Addresses at which instances and their ranks listen for each other, as text.

It owns their form; pure, it must not connect to any.
"""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"tcp://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "::1") or host.startswith("127.")


def is_address(text: str) -> bool:
    """Whether it is `tcp://HOST:PORT`. ZeroMQ knows more forms; none of them may be named by another instance."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[1]) < 1 << 16


def reachable(address: str, known: str) -> str:
    """`tcp://0.0.0.0:5000`, heard from an instance known as `tcp://host:4000`, is `tcp://host:5000`."""
    host = known.removeprefix("tcp://").rpartition(":")[0]
    return address.replace("//0.0.0.0:", f"//{host}:")
