"""A decode instance's connection to one prefill instance.

It owns the socket, the handshake and the detection of a lost connection; it must not know about requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import zmq
from zmq.utils.monitor import recv_monitor_message

from longspan.config.addresses import is_address, reachable
from longspan.disaggregation.authentication import present_token
from longspan.disaggregation.driver import keep_alive
from longspan.disaggregation.messages import Format, Hello, Refused, ToDecode, ToPrefill, Welcome, decode, encode
from longspan.plan.source import Source

_LOSS_EVENTS = (
    zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip
_NO_ANSWER = "does not answer: nothing listens there, or it has another transfer token"
_SHORT_PAUSE, _LONG_PAUSE = 2.0, 30.0  # seconds without a new attempt: after a lost connection, after a refusal
_MAX_SHOWN = 300  # characters of another instance's text in the log
CheckSource = Callable[[Source], str | None]


class Connection:
    """A connection to one address. It is opened when it is needed.

    After a failure it is not opened again for some seconds, so that requests do not wait for the same address one after
    the other.
    """

    def __init__(
        self, address: str, page_format: Format, timeout: float, token: str, context: zmq.Context[zmq.Socket[bytes]],
        check: CheckSource,
    ) -> None:  # fmt: skip
        self.address = address
        # the other instance's ranks, once it has sent `Welcome` and `check` has found no problem
        self.source: Source | None = None
        # why the last attempt failed; None while there is no failure
        self.problem: str | None = None
        self._format = page_format
        self._timeout = timeout  # seconds for the handshake
        self._token = token
        self._context = context
        self._check = check
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._opened_at = 0.0
        self._retry_at = 0.0

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The open sockets, for a poller."""
        return [socket for socket in (self._socket, self._monitor) if socket is not None]

    def open(self) -> bool:
        """Open the connection if it is closed. True if messages can be sent, also before the handshake has ended."""
        now = time.monotonic()
        if self._socket is not None or now < self._retry_at:
            return self._socket is not None
        self.problem, self.source = None, None
        self._opened_at = now
        if not is_address(self.address):
            self._fail("is not a valid address", _LONG_PAUSE)
            return False
        socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)  # unlimited: the server bounds the number of requests
        keep_alive(socket)
        present_token(socket, self._token)
        self._socket = socket
        self._monitor = socket.get_monitor_socket(_LOSS_EVENTS)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            self._fail(f"is not a valid address ({error})", _LONG_PAUSE)
            return False
        self.send(Hello(self._format))
        return True

    def send(self, message: ToPrefill) -> None:
        """Send a message. It is dropped if the connection is closed, and may be lost if the other instance ends."""
        if self._socket is not None:
            self._socket.send(encode(message))

    def receive(self) -> list[ToDecode]:
        """The messages since the last call, without those of the handshake. Look at `problem` afterwards."""
        found: list[ToDecode] = []
        while self._socket is not None and self._socket.poll(0):
            match decode(self._socket.recv(), ToDecode):
                case Welcome(source):
                    self._take_source(source)
                case Refused(reason):
                    self._fail(f"refuses this instance: {one_line(reason)}", _LONG_PAUSE)
                case None:
                    self._fail("sends messages of another protocol", _LONG_PAUSE)
                case message:
                    found.append(message)  # type: ignore[arg-type]
        self._check_alive()
        return found

    def close(self) -> None:
        """Close the connection. It can be opened again."""
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=100)
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._socket = self._monitor = self.source = None

    def refuse(self, reason: str) -> None:
        """Close the connection and do not use the address for half a minute."""
        self._fail(reason, _LONG_PAUSE)

    def _take_source(self, source: Source) -> None:
        """Store the ranks of a `Welcome`, with `0.0.0.0` replaced by the host of this connection."""
        source = replace(source, addresses=tuple(reachable(address, self.address) for address in source.addresses))
        problem = self._check(source)
        if problem is None:
            self.source = source
        else:
            self._fail(one_line(problem), _LONG_PAUSE)

    def _check_alive(self) -> None:
        while self._monitor is not None and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._fail("closed the connection" if self.source else _NO_ANSWER, _SHORT_PAUSE)
        if self._socket is not None and self.source is None and time.monotonic() - self._opened_at > self._timeout:
            self._fail(f"did not answer for {self._timeout:g} s", _SHORT_PAUSE)

    def _fail(self, problem: str, pause: float) -> None:
        self.close()
        self.problem = problem
        self._retry_at = time.monotonic() + pause


def one_line(text: str) -> str:
    """Text of another instance, made safe for a log: one line of bounded length."""
    return " ".join(text.split())[:_MAX_SHOWN]
