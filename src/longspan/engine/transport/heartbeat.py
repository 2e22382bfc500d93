"""Heartbeats of a process, and the seconds since the last one.

It owns the thread that sends them and the measurement of silence; it must not know what follows from either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread

import zmq

_LONGEST_INTERVAL = 1.0


class Heartbeat:
    """A thread that sends `message()` every `seconds`, independently of the other threads; None is not sent.

    From now on only this thread may use `socket`, because ZeroMQ's sockets are not thread-safe. `stop` closes it.
    """

    def __init__(self, socket: zmq.Socket[bytes], message: Callable[[], bytes | None], seconds: float) -> None:
        self._socket = socket
        self._message = message
        self._seconds = seconds
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="longspan-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close its socket."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            message = self._message()
            if message is not None:
                with suppress(zmq.Again):  # no peer is connected
                    self._socket.send(message, zmq.DONTWAIT)
        self._socket.close(linger=0)


class SilenceTimer:
    """Seconds since a peer's last message, without the time in which this process did not look for messages.

    Between two calls of `update` at most one second counts. In the rest of the time this process itself was busy or
    stopped.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds = 0.0
        self._updated_at = clock()

    def reset(self) -> None:
        """Set the seconds to zero: a message has arrived."""
        self.seconds, self._updated_at = 0.0, self._clock()

    def update(self) -> float:
        """Add the time since the last call, in which no message has arrived; returns the seconds of silence."""
        now = self._clock()
        self.seconds += min(_LONGEST_INTERVAL, now - self._updated_at)
        self._updated_at = now
        return self.seconds
