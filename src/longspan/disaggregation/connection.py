"""A decode instance's line to one prefill instance.

It owns the socket and what is known of the other side's life; it must not know of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import zmq
from zmq.utils.monitor import recv_monitor_message

from longspan.config.addresses import is_address, reachable
from longspan.disaggregation.driver import keep_alive
from longspan.disaggregation.lock import unlock
from longspan.disaggregation.messages import Format, Hello, Refused, ToDecode, ToPrefill, Welcome, encode
from longspan.disaggregation.worker import decoded
from longspan.plan.source import Source

_LOST = (
    zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip
_NO_ANSWER = "does not answer: nobody is there, or it has another transfer token"
_BRIEF_PAUSE, _LONG_PAUSE = 2.0, 30.0
_SHOWN = 300  # characters of what the other side says
CheckSource = Callable[[Source], str | None]


class Connection:
    """One address. It is opened when it is needed; after a loss it rests for a while, so that requests do not wait for
    it one after the other.

    `source` is where its pages are, once it has answered and `check` has found nothing wrong; `problem` why it cannot
    be used now, None if it can.
    """

    def __init__(
        self, address: str, form: Format, patience: float, token: str, context: zmq.Context[zmq.Socket[bytes]],
        check: CheckSource,
    ) -> None:  # fmt: skip
        self.address = address
        self.source: Source | None = None
        self.problem: str | None = None
        self._form = form
        self._patience = patience
        self._token = token
        self._context = context
        self._check = check
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._opened = 0.0
        self._rests_until = 0.0

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """To listen to."""
        return [socket for socket in (self._socket, self._monitor) if socket is not None]

    def open(self) -> bool:
        """Whether messages can be sent, though nobody may have answered yet."""
        now = time.monotonic()
        if self._socket is not None or now < self._rests_until:
            return self._socket is not None
        self.problem, self.source = None, None
        self._opened = now
        if not is_address(self.address):
            self._lose("is no address", _LONG_PAUSE)
            return False
        socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)  # prompts: bounded where they come in
        keep_alive(socket)
        unlock(socket, self._token)
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_LOST)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            self._lose(f"is no address ({error})", _LONG_PAUSE)
            return False
        self.send(Hello(self._form))
        return True

    def send(self, message: ToPrefill) -> None:
        """Hand a message over; it is lost if the connection is."""
        if self._socket is not None:
            self._socket.send(encode(message))

    def receive(self) -> list[ToDecode]:
        """What has come since the last call; look at `problem` afterwards."""
        found: list[ToDecode] = []
        while self._socket is not None and self._socket.poll(0):
            match decoded(self._socket.recv(), ToDecode):
                case Welcome(source):
                    self._welcome(source)
                case Refused(reason):
                    self._lose(f"refuses this instance: {one_line(reason)}", _LONG_PAUSE)
                case None:
                    self._lose("speaks another language", _LONG_PAUSE)
                case message:
                    found.append(message)  # type: ignore[arg-type]
        self._look()
        return found

    def close(self) -> None:
        """End it."""
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=100)
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._socket = self._monitor = self.source = None

    def refuse(self, reason: str) -> None:
        """Do not use it for a while."""
        self._lose(reason, _LONG_PAUSE)

    def _welcome(self, source: Source) -> None:
        source = replace(source, addresses=tuple(reachable(address, self.address) for address in source.addresses))
        problem = self._check(source)
        if problem is None:
            self.source = source
        else:
            self._lose(one_line(problem), _LONG_PAUSE)

    def _look(self) -> None:
        while self._monitor is not None and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._lose("closed the connection" if self.source else _NO_ANSWER, _BRIEF_PAUSE)
        if self._socket is not None and self.source is None and time.monotonic() - self._opened > self._patience:
            self._lose(f"did not answer for {self._patience:g} s", _BRIEF_PAUSE)

    def _lose(self, problem: str, pause: float) -> None:
        self.close()
        self.problem = problem
        self._rests_until = time.monotonic() + pause


def one_line(text: str) -> str:
    """What another instance says, fit for a log."""
    return " ".join(text.split())[:_SHOWN]
