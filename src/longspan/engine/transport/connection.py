"""Connections between a driver and its ranks: sockets that detect a lost host, and the choice of a host's address.

It owns sockets and addresses; it must not know which messages are sent.
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
_CONNECT_SECONDS = 120.0
_POLL_MS = 200
_LOOPBACK = "127.0.0.1"
_LARGEST_MESSAGE = 1 << 28  # bytes; plans, results of steps and traces are far smaller
_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


def detect_lost_peers(zmq_socket: zmq.Socket[bytes], seconds: float) -> None:
    """Make a socket disconnect peers from which nothing has come for `seconds`, and peers that send too large messages.

    A peer is silent if its process is stopped or its host cannot be reached. Call it before `bind` or `connect`.
    ZeroMQ's own threads send and answer these heartbeats, so it does not matter what the processes compute.
    """
    zmq_socket.maxmsgsize = _LARGEST_MESSAGE
    zmq_socket.heartbeat_ivl = _HEARTBEAT_MS
    zmq_socket.heartbeat_timeout = int(1000 * seconds)


def connect_to_driver(zmq_socket: zmq.Socket[bytes], address: str, hello: bytes) -> tuple[bytes, ConnectionWatch]:
    """Connect to the driver at an address and send it `hello`; returns its reply and a watch on the connection.

    If the driver disconnects before it replies, this waits for the next one. Raises `ConfigError` if two minutes pass
    without a connection.
    """
    monitor = zmq_socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    zmq_socket.connect(address)
    poller = zmq.Poller()
    poller.register(monitor, zmq.POLLIN)
    poller.register(zmq_socket, zmq.POLLIN)
    connected, deadline = False, time.monotonic() + _CONNECT_SECONDS
    while connected or time.monotonic() < deadline:
        ready = dict(poller.poll(_POLL_MS))
        if zmq_socket in ready and (reply := zmq_socket.recv()):
            return reply, ConnectionWatch(monitor)
        if monitor in ready:
            connected = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            deadline = time.monotonic() + _CONNECT_SECONDS
            if connected:
                zmq_socket.send(hello)
    raise ConfigError(
        "driver", address, f"no driver has answered for {_CONNECT_SECONDS:.0f} s",
        "start `longspan serve` with `--executor external --listen` there, and look for a firewall between",
    )  # fmt: skip


def own_address(peer: str) -> str:
    """The address of this host on its route to `tcp://host:port`; empty for an `ipc` address, so for the same host.

    Raises `ConfigError` for an address that is invalid or cannot be resolved.
    """
    target = urlsplit(peer)
    if target.scheme == "ipc":
        return ""
    try:
        if target.scheme != "tcp" or not target.hostname or not target.port:
            raise ValueError("not an address")
        family, kind, *_, where = socket.getaddrinfo(target.hostname, target.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # of a datagram socket: sends nothing, only chooses the route
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError("driver", peer, f"cannot be reached ({error})", "give tcp://host:port") from error


def open_store(host: str) -> TCPStore:
    """A new store for the rendezvous of ranks on several hosts, at an address of this host and a free port.

    torch.distributed finds this store by its port and uses it, so the port is never released in between. The store
    listens on all addresses, without authentication.
    """
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)


def use_interface(host: str) -> None:
    """Make gloo and NCCL use the network interface that has this address; empty means the loopback.

    `host` is this host's address on its route to the driver, or empty if all ranks are on one host. By default gloo
    would use the interface that the host name resolves to, often the loopback, and NCCL any interface. Variables that
    the user has set are kept.
    """
    if interface := interface_of(host or _LOOPBACK):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None if no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # this interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
