"""A process that ends with the one it works for, however that one ends.

It owns the watches; it must not know what either process does.
"""

from __future__ import annotations

import os
import time
from threading import Event, Thread

import zmq
from zmq.utils.monitor import recv_monitor_message

_WATCH_SECONDS = 0.5
_POLL_MS = 200


def end_with_parent(parent: int) -> None:
    """From now on this process ends within a second of its parent: no orphans, even deep in a collective.

    `parent` is the parent's id as the parent itself gave it: it may be gone by now.
    """
    Thread(target=_watch, args=(parent,), daemon=True).start()


class ConnectionWatch:
    """From now on this process ends as soon as a connection is lost, even deep in a collective.

    `monitor` is the connected socket's, for `EVENT_DISCONNECTED`; the watch closes it.
    """

    def __init__(self, monitor: zmq.Socket[bytes]) -> None:
        self._monitor = monitor
        self._stopped = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The connection may go from now on."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            if self._monitor.poll(_POLL_MS):
                lost = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
                if lost and not self._stopped.is_set():
                    os._exit(1)
        self._monitor.close(linger=0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
