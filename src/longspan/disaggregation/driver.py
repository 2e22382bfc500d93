"""What the two roles share beside the engine's core: the mailbox, and the words of the ranks.

It owns the sockets that ranks and other instances write to, each their own; what they say is the roles' business.
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
from longspan.disaggregation.lock import lock
from longspan.disaggregation.messages import Broken, Format, FromRank, Serving, ToDecode, ToPrefill, encode
from longspan.disaggregation.signature import token_digest
from longspan.disaggregation.worker import decoded
from longspan.errors import ConfigError, EngineError
from longspan.plan.plan import StepPlan
from longspan.plan.source import Source
from longspan.private_folder import PrivateFolder
from longspan.request import CoreRequest, TokenOutput

_HEARTBEAT_MS = 1000
_SILENCE_MS = 5000
_START_SECONDS = 60.0


@dataclass(frozen=True)
class InstanceInfo:
    """What an instance says of itself to who puts pairs together."""

    role: str
    # where decode instances reach it; '' for a decode instance, which nobody needs to reach
    address: str
    format: Format
    # prefill instances that it takes work of, whoever names them
    prefill_peers: tuple[str, ...] = ()
    # which transfer token it has, see `token_digest`
    token: str = ""

    @staticmethod
    def of(config: TransferConfig, address: str, form: Format) -> InstanceInfo:
        """The card of an instance that listens at `address`."""
        return InstanceInfo(config.role, address, form, config.prefill_peers, token_digest(config.token))


class CoreHandle(Protocol):
    """The core, as a role uses it."""

    def begin(self, request: CoreRequest, source: Source | None) -> None:
        """Queue a request whose prompt is computed here, or fetched."""

    def add(self, request: CoreRequest) -> None:
        """Queue a request, as a user's is."""

    def leave(self, request_id: str) -> None:
        """Take a request out of the scheduler, to `begin` it anew; its pages are free."""

    def finish(self, request_id: str) -> None:
        """End a request; its pages are free."""

    def arrived(self, request_id: str) -> None:
        """All pages of a fetched prompt are filled."""


@dataclass
class TransferCounters:
    """What a role has done so far. A prefill instance counts prompts `sent`; a decode instance those `fetched`, their
    `tokens` and `bytes`, and how often another instance had to be asked, or none was left: `retried`."""

    sent: int = 0
    fetched: int = 0
    tokens: int = 0
    bytes: int = 0
    retried: int = 0


class ControlSocket:
    """Where ranks and, of a prefill instance, decode instances write to. Raises `ConfigError` for an address that
    cannot be taken.

    Ranks write to a socket in a folder that no other user can open: what ends the core cannot be said from outside.
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
        # ranks need no token, and with some executors their configuration crosses a network
        control_address = self._ranks.getsockopt_string(zmq.LAST_ENDPOINT)
        self.config = replace(config, control_address=control_address, epoch=secrets.token_hex(8), token="")

    def from_ranks(self) -> Iterator[object]:
        """What ranks have said; raises `EngineError` if one can move no more pages."""
        while self._ranks.poll(0):
            message = decoded(self._ranks.recv(), FromRank)
            if isinstance(message, Broken):
                raise EngineError(f"rank {message.rank} can move no more pages: {message.reason}")
            yield message

    def from_peers(self) -> Iterator[tuple[bytes, object]]:
        """What decode instances have said, each with its sender."""
        while self._peers is not None and self._peers.poll(0):
            sender, *_, data = self._peers.recv_multipart()
            yield sender, decoded(data, ToPrefill)

    def addresses(self, ranks: int) -> tuple[str, ...]:
        """Where the ranks answer, in rank order, once all have said so."""
        found: dict[int, str] = {}
        deadline = time.monotonic() + _START_SECONDS
        while len(found) < ranks:
            if not self._ranks.poll(1000) and time.monotonic() > deadline:
                raise EngineError(f"{ranks - len(found)} ranks did not open their page servers")
            for message in self.from_ranks():
                if isinstance(message, Serving):
                    found[message.rank] = message.address
        return tuple(found[rank] for rank in sorted(found))

    def send(self, receiver: bytes, message: ToDecode) -> bool:
        """Whether the receiver is still there."""
        try:
            if self._peers is not None:
                self._peers.send_multipart([receiver, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """Give the folder back, when the sockets are closed."""
        self._folder.cleanup()


class Role(ABC):
    """One side of pairs, beside a core; called between steps. Raises `ConfigError` for an address it cannot have."""

    def __init__(self, config: TransferConfig, form: Format) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = ControlSocket(config, self._context)
        self.config = self._control.config  # with what the ranks must know
        self.card = InstanceInfo.of(config, self._control.address, form)
        self.counters = TransferCounters()
        self._core: CoreHandle | None = None

    @abstractmethod
    def start(self, core: CoreHandle, ranks: int) -> None:
        """The core's ranks are ready."""

    def add(self, request: CoreRequest) -> bool:
        """Whether the role takes a new request in charge."""
        return False

    @abstractmethod
    def finish(self, request_id: str) -> None:
        """A request has ended in the core."""

    @abstractmethod
    def submitted(self, plan: StepPlan) -> None:
        """The ranks will hear of a plan."""

    def keeps(self, output: TokenOutput) -> bool:
        """Whether an ended request's pages stay; its output is then nobody's."""
        return False

    @abstractmethod
    def exchange(self) -> None:
        """Read what has come, answer, and look after what takes too long."""

    def wait(self, seconds: float) -> None:
        """Until something comes, or so long."""
        wait_for(self.sockets, seconds)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """Those to listen to while the core has nothing to do."""
        return self._control.sockets

    def close(self) -> None:
        """End all connections."""
        self._context.destroy(linger=100)
        self._control.close()


def _listen(config: TransferConfig, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The socket for decode instances."""
    socket = context.socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    keep_alive(socket)
    lock(socket, config.token)
    try:
        socket.bind(f"tcp://{config.host}:{config.port or '*'}")
    except zmq.ZMQError as error:
        raise ConfigError(
            "transfer_port", f"{config.host}:{config.port}", f"cannot be listened at ({error})",
            "give another --transfer-host or --transfer-port",
        ) from error  # fmt: skip
    return socket


def keep_alive(socket: zmq.Socket[bytes]) -> None:
    """A machine that is gone without a word counts as disconnected after some seconds of silence."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)


def wait_for(sockets: Sequence[zmq.Socket[bytes]], seconds: float) -> bool:
    """Whether one of the sockets has something to read before the time is over."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    return bool(poller.poll(int(1000 * seconds)))
