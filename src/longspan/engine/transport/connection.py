"""The way between a driver and its ranks: sockets that notice a lost host, and which of a host's addresses is meant.

It owns sockets and addresses; it must not know what is said.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from urllib.parse import urlsplit

import zmq
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, but hides it from type checkers
from zmq.utils.monitor import recv_monitor_message

from longspan.engine.transport.lifetime import ConnectionWatch
from longspan.errors import ConfigError

_HEARTBEAT_MS = 1000
_REACH_SECONDS = 120.0
_POLL_MS = 200
_LOOPBACK = "127.0.0.1"
_LARGEST_MESSAGE = 1 << 28  # plans, steps' results and traces are far smaller; whoever sends more is no rank or driver
_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


def watch_peers(line: zmq.Socket[bytes], seconds: float) -> None:
    """Make a socket notice that a peer has been silent for so long: it is stopped, or its host was cut off. It is cut
    off, too, if it sends a message that is too large to be one.

    ZeroMQ's own thread beats and answers, so it does not matter what the program does.
    """
    line.maxmsgsize = _LARGEST_MESSAGE
    line.heartbeat_ivl = _HEARTBEAT_MS
    line.heartbeat_timeout = int(1000 * seconds)


def meet_driver(line: zmq.Socket[bytes], address: str, hello: bytes) -> tuple[bytes, ConnectionWatch]:
    """Say hello to whichever driver listens at the address, and wait for its word.

    A driver that goes before it has spoken is waited for as one that has not come. Raises `ConfigError` if there is
    none for two minutes.
    """
    monitor = line.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    line.connect(address)
    poller = zmq.Poller()
    poller.register(monitor, zmq.POLLIN)
    poller.register(line, zmq.POLLIN)
    reached, deadline = False, time.monotonic() + _REACH_SECONDS
    while reached or time.monotonic() < deadline:
        ready = dict(poller.poll(_POLL_MS))
        if line in ready and (word := line.recv()):
            return word, ConnectionWatch(monitor)
        if monitor in ready:
            reached = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            deadline = time.monotonic() + _REACH_SECONDS
            if reached:
                line.send(hello)
    raise ConfigError(
        "driver", address, f"nobody has answered for {_REACH_SECONDS:.0f} s",
        "start `longspan serve` with `--executor external --listen` there, and look for a firewall between",
    )  # fmt: skip


def own_address(peer: str) -> str:
    """The address of this host from which it reaches a `tcp://host:port`; empty for a peer on the same host (`ipc`).

    Raises `ConfigError` if the host has no such name or address.
    """
    target = urlsplit(peer)
    if target.scheme == "ipc":
        return ""
    try:
        if target.scheme != "tcp" or not target.hostname or not target.port:
            raise ValueError("not an address")
        family, kind, *_, where = socket.getaddrinfo(target.hostname, target.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing: it only picks the way
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError("driver", peer, f"cannot be reached ({error})", "give tcp://host:port") from error


def open_store(host: str) -> TCPStore:
    """A new store where ranks of several machines can meet, at an address of this host, on a free port.

    torch.distributed takes it up by that port, so the port is never free in between. It listens on all addresses and
    asks for no key.
    """
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)


def use_interface(host: str) -> None:
    """Make gloo and NCCL use the network interface that has this address; '' is the loopback, for ranks of one machine.

    `host` is this machine's address on its route to the driver. By default gloo would use the interface that the host
    name resolves to, often the loopback, and NCCL any interface. Variables that the user has set are kept.
    """
    if interface := interface_of(host or _LOOPBACK):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
