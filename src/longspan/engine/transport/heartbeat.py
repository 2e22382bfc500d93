"""Signs of life of a process, and how long there were none.

It owns the thread that gives them and the count of silence; it must not know what follows from either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread

import zmq

_LONGEST_LOOK = 1.0


class Heartbeat:
    """A thread that sends `word()` every `seconds`, whatever the process's other threads do; None is not sent.

    The socket is the thread's own from now on (ZeroMQ's are not thread-safe), and closed by `stop`.
    """

    def __init__(self, line: zmq.Socket[bytes], word: Callable[[], bytes | None], seconds: float) -> None:
        self._line = line
        self._word = word
        self._seconds = seconds
        self._stopped = Event()
        self._thread = Thread(target=self._beat, name="longspan-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(self._seconds):
            word = self._word()
            if word is not None:
                with suppress(zmq.Again):  # nobody listens
                    self._line.send(word, zmq.DONTWAIT)
        self._line.close(linger=0)


class Silence:
    """How long somebody has said nothing, while its listener was listening.

    Of the time between two looks a second counts at most: in the rest the listener itself was busy or stopped.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.seconds = 0.0
        self._looked = clock()

    def heard(self) -> None:
        """There was a word."""
        self.seconds, self._looked = 0.0, self._clock()

    def look(self) -> float:
        """There was none: the seconds of silence up to now."""
        now = self._clock()
        self.seconds += min(_LONGEST_LOOK, now - self._looked)
        self._looked = now
        return self.seconds
