"""The sockets that HTTP is served on, opened before anything that takes long.

It owns addresses and what is said where one cannot be had; it must not know what is served.
"""

from __future__ import annotations

import errno
import socket

from longspan.errors import ConfigError
from longspan.server.options import ListenOptions

_PROBLEMS = {
    errno.EADDRINUSE: ("port", "is in use", "end what listens there, or give another --port; 0 takes a free one"),
    errno.EACCES: ("port", "is not allowed to you", "give a --port of 1024 or more"),
    errno.EADDRNOTAVAIL: ("host", "is no address of this machine", "give one of its own, or 0.0.0.0 for every one"),
}
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # of IPv6 on a machine without it


def open_sockets(options: ListenOptions) -> list[socket.socket]:
    """One for each address of the host, all on one port; they do not listen yet. Raises `ConfigError`."""
    host, port = options.host, options.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        problem = f"cannot be resolved ({error.strerror})"
        raise ConfigError("host", host, problem, "give an address of this machine") from error
    opened: list[socket.socket] = []
    absent: OSError | None = None
    for family, address in sorted({(family, address) for family, _, _, _, address in found}):
        try:
            opened.append(_bound(family, (address[0], port, *address[2:])))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _error(options, port, error) from error
            absent = error
            continue
        port = opened[0].getsockname()[1]  # all the same where 0 was asked for
    if absent is not None and not opened:
        raise _error(options, port, absent) from absent
    return opened


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


def _error(options: ListenOptions, port: int, error: OSError) -> ConfigError:
    """In words a user can act on."""
    unknown = ("port", f"cannot be opened ({error.strerror})", "give another --host or --port")
    field, problem, remedy = _PROBLEMS.get(error.errno or 0, unknown)
    if field == "host":
        return ConfigError(field, options.host, problem, remedy)
    return ConfigError(field, port, f"{problem} on {options.host}", remedy)
