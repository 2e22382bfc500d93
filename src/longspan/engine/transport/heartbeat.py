"""Heartbeats of a process, and the seconds since the last one.

It owns the thread that sends them and the measurement of silence; it must not know what follows from either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread

import zmq

_LONGEST_LOOK = 1.0


class Heartbeat:
    """A thread that sends the message `word()` every `seconds`, whatever other threads do; None is not sent.

    From now on only this thread may use the socket `line`, because ZeroMQ's sockets are not thread-safe. `stop` closes
    it.
    """

    def __init__(self, line: zmq.Socket[bytes], word: Callable[[], bytes | None], seconds: float) -> None:
        self._line = line
        self._word = word
        self._seconds = seconds
        self._stopped = Event()
        self._thread = Thread(target=self._beat, name="longspan-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close its socket."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(self._seconds):
            word = self._word()
            if word is not None:
                with suppress(zmq.Again):  # no peer is connected
                    self._line.send(word, zmq.DONTWAIT)
        self._line.close(linger=0)


class Silence:
    """Seconds since a peer's last message, as far as its listener was looking for one.

    At most one second between two calls of `look` counts. In the rest the listener itself was busy or stopped.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds = 0.0
        self._looked = clock()

    def heard(self) -> None:
        """Set the seconds to zero: a message has come."""
        self.seconds, self._looked = 0.0, self._clock()

    def look(self) -> float:
        """Add the time since the last call, as no message has come; returns the seconds of silence."""
        now = self._clock()
        self.seconds += min(_LONGEST_LOOK, now - self._looked)
        self._looked = now
        return self.seconds
