"""Ends this process when its parent process or its connection to the driver has ended, for whatever reason.

It owns the threads that detect that end; it must not know what either process does.
"""

from __future__ import annotations

import os
import time
from threading import Event, Thread

import zmq
from zmq.utils.monitor import recv_monitor_message

_CHECK_SECONDS = 0.5
_POLL_MS = 200


def end_with_parent(parent: int) -> None:
    """From now on, end this process within a second of its parent's end, even if a collective blocks.

    `parent` is the parent's process id as the parent passed it. `os.getppid` would be wrong if the parent has ended
    already.
    """
    Thread(target=_wait_for_end, args=(parent,), daemon=True).start()


class ConnectionWatch:
    """From now on, end this process as soon as a connection is lost, even if a collective blocks.

    `monitor` is the monitor socket of the connection, for `EVENT_DISCONNECTED`. The watch closes it.
    """

    def __init__(self, monitor: zmq.Socket[bytes]) -> None:
        self._monitor = monitor
        self._stopped = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch, so that the connection can be closed without ending the process."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            if self._monitor.poll(_POLL_MS):
                lost = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
                if lost and not self._stopped.is_set():
                    os._exit(1)
        self._monitor.close(linger=0)


def _wait_for_end(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_SECONDS)
    os._exit(1)
