"""The driver's part of a transfer that both roles share: the control socket, and the interface between role and core.

It owns the sockets on which ranks and decode instances reach the driver; what their messages mean is for the roles.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import zmq

from longspan.config import TransferConfig
from longspan.disaggregation.authentication import require_token
from longspan.disaggregation.messages import (
    Format,
    FromRank,
    SenderReady,
    ToDecode,
    ToPrefill,
    TransferFailed,
    decode,
    encode,
)
from longspan.disaggregation.signature import token_digest
from longspan.errors import ConfigError, EngineError
from longspan.plan.plan import StepPlan
from longspan.plan.source import Source
from longspan.private_folder import PrivateFolder
from longspan.request import CoreRequest, TokenOutput

_HEARTBEAT_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 5000
_START_SECONDS = 60.0


@dataclass(frozen=True)
class InstanceInfo:
    """What an instance reports to the router, which decides from it which instances can work together."""

    # `prefill` or `decode`
    role: str
    # where decode instances connect to; empty for a decode instance, which has no such socket
    address: str
    # what its pages mean
    format: Format
    # prefill instances that a client's request may name without a signature
    prefill_peers: tuple[str, ...] = ()
    # digest of its transfer token, see `token_digest`
    token: str = ""

    @staticmethod
    def of(config: TransferConfig, address: str, page_format: Format) -> InstanceInfo:
        """The info of an instance that listens at `address`."""
        return InstanceInfo(config.role, address, page_format, config.prefill_peers, token_digest(config.token))


class CoreHandle(Protocol):
    """The part of the engine core that a role uses."""

    def begin(self, request: CoreRequest, source: Source | None) -> None:
        """Queue a request whose prompt is computed here, or fetched from `source`."""

    def add(self, request: CoreRequest) -> None:
        """Queue a request as if it came from a user."""

    def remove(self, request_id: str) -> None:
        """Remove a request from the scheduler and free its pages. `begin` may queue it again."""

    def finish(self, request_id: str) -> None:
        """End a request and free its pages."""

    def arrived(self, request_id: str) -> None:
        """All pages of a fetched prompt are in the pools: the request can decode."""


@dataclass
class TransferCounters:
    """Counts of an instance since its core started."""

    # prefill instance: prompts whose pages were fetched
    sent: int = 0
    # decode instance: prompts whose pages it fetched
    fetched: int = 0
    # decode instance: tokens of these prompts, without those found in its own prefix cache
    tokens: int = 0
    # decode instance: bytes of KV, over all ranks
    bytes: int = 0
    # decode instance: prompts that failed at a prefill instance and went to the next one, or were computed here
    retried: int = 0


class ControlSocket:
    """The sockets on which a driver receives messages of its ranks and, in a prefill instance, of decode instances.

    Ranks use a Unix socket in a folder of this user, so that no other instance can send the messages that end the core.
    Raises `ConfigError` for an address that cannot be bound.
    """

    def __init__(self, config: TransferConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._folder = PrivateFolder()
        self._ranks = context.socket(zmq.PULL)
        self._ranks.set_hwm(0)
        self._ranks.bind(f"ipc://{self._folder.name}/ranks")
        self._peers: zmq.Socket[bytes] | None = None
        self.address = ""
        if config.role == "prefill":
            self._peers = _listen(config, context)
            self.address = self._peers.getsockopt_string(zmq.LAST_ENDPOINT)
        self.sockets = [self._ranks] if self._peers is None else [self._ranks, self._peers]
        # the ranks' configuration: without the token, which they do not need and some executors would send unencrypted
        control_address = self._ranks.getsockopt_string(zmq.LAST_ENDPOINT)
        self.config = replace(config, control_address=control_address, epoch=secrets.token_hex(8), token="")

    def from_ranks(self) -> Iterator[object]:
        """Messages of ranks that have arrived. Raises `EngineError` if a rank's transfer thread has ended."""
        while self._ranks.poll(0):
            message = decode(self._ranks.recv(), FromRank)
            if isinstance(message, TransferFailed):
                raise EngineError(f"rank {message.rank} can transfer no more pages: {message.reason}")
            yield message

    def from_peers(self) -> Iterator[tuple[bytes, object]]:
        """Messages of decode instances that have arrived, each with its sender; None for an invalid message."""
        while self._peers is not None and self._peers.poll(0):
            sender, *_, data = self._peers.recv_multipart()
            yield sender, decode(data, ToPrefill)

    def addresses(self, ranks: int) -> tuple[str, ...]:
        """Wait until all page senders listen; returns their addresses in rank order."""
        found: dict[int, str] = {}
        deadline = time.monotonic() + _START_SECONDS
        while len(found) < ranks:
            if not self._ranks.poll(1000) and time.monotonic() > deadline:
                raise EngineError(f"{ranks - len(found)} ranks did not open their page senders")
            for message in self.from_ranks():
                if isinstance(message, SenderReady):
                    found[message.rank] = message.address
        return tuple(found[rank] for rank in sorted(found))

    def send(self, receiver: bytes, message: ToDecode) -> bool:
        """Send a message to a decode instance. False if it has disconnected."""
        try:
            if self._peers is not None:
                self._peers.send_multipart([receiver, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """Remove the folder. Call it after the sockets are closed."""
        self._folder.cleanup()


class Role(ABC):
    """One side of a transfer, in the driver. The core calls it between steps.

    Raises `ConfigError` for an address that cannot be bound.
    """

    def __init__(self, config: TransferConfig, page_format: Format) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = ControlSocket(config, self._context)
        self.config = self._control.config  # for the ranks: with the control address, without the token
        self.info = InstanceInfo.of(config, self._control.address, page_format)
        self.counters = TransferCounters()
        self._core: CoreHandle | None = None

    @abstractmethod
    def start(self, core: CoreHandle, ranks: int) -> None:
        """Called once, when all ranks are ready."""

    def add(self, request: CoreRequest) -> bool:
        """Called for a new request. True if the role will queue it itself, with `CoreHandle.begin`."""
        return False

    @abstractmethod
    def finish(self, request_id: str) -> None:
        """Called when a request has ended in the core."""

    @abstractmethod
    def submitted(self, plan: StepPlan) -> None:
        """Called when a plan has been submitted to the ranks."""

    def holds(self, output: TokenOutput) -> bool:
        """Called when a request has computed its last token. True if its pages are kept for another instance.

        The output is then not for a user.
        """
        return False

    @abstractmethod
    def poll(self) -> None:
        """Handle the messages that have arrived, and check time limits."""

    def wait(self, seconds: float) -> None:
        """Wait until a message arrives, but no longer than `seconds`."""
        wait_for(self.sockets, seconds)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The open sockets, for a poller while the core has nothing to do."""
        return self._control.sockets

    def close(self) -> None:
        """Close all connections."""
        self._context.destroy(linger=100)
        self._control.close()


def _listen(config: TransferConfig, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The socket that decode instances connect to."""
    socket = context.socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that has disconnected is an error
    keep_alive(socket)
    require_token(socket, config.token)
    try:
        socket.bind(f"tcp://{config.host}:{config.port or '*'}")
    except zmq.ZMQError as error:
        raise ConfigError(
            "transfer_port", f"{config.host}:{config.port}", f"cannot be listened at ({error})",
            "give another --transfer-host or --transfer-port",
        ) from error  # fmt: skip
    return socket


def keep_alive(socket: zmq.Socket[bytes]) -> None:
    """Make ZeroMQ send heartbeats, so that a host that vanishes counts as disconnected after five seconds."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)


def wait_for(sockets: Sequence[zmq.Socket[bytes]], seconds: float) -> bool:
    """Wait until one of the sockets can be read, but no longer than `seconds`; returns whether one can."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    return bool(poller.poll(int(1000 * seconds)))
