"""The base of a rank's two kinds of transfer thread, sender and receiver.

It owns the thread, its wake-up and its connection to the driver; it must not know which pages are transferred.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock, Thread

import zmq

from longspan.cache.pages import PageTable
from longspan.config import TransferConfig
from longspan.disaggregation.messages import FromRank, TransferFailed, encode
from longspan.disaggregation.pool_access import PoolAccess
from longspan.plan.plan import StepPlan
from longspan.plan.source import Part

_JOIN_SECONDS = 5.0
_WAKE, _END = b"", b"end"
TableOf = Callable[[str], PageTable]


class TransferThread(ABC):
    """A thread that transfers one rank's pages while the rank computes steps.

    The rank's own thread calls `apply`, `computed`, `wake` and `close`; all other methods run on this thread. For each
    plan the rank calls `apply` before it computes the step, and `computed` when the step is launched. `_lock` guards
    what both threads use. While it is held, no page is given to another request, because `apply` waits for it.
    """

    def __init__(self, part: Part, access: PoolAccess, config: TransferConfig) -> None:
        self._part = part
        self._access = access
        self._config = config
        self._lock = Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wake_receiver = self._context.socket(zmq.PULL)
        self._wake_receiver.bind("inproc://wake")
        self._wake_sender = self._context.socket(zmq.PUSH)
        self._wake_sender.connect("inproc://wake")
        self._driver = self._context.socket(zmq.PUSH)
        self._driver.connect(config.control_address)
        self._thread = Thread(target=self._run, name=f"longspan-transfer-{part.rank}", daemon=True)

    @abstractmethod
    def apply(self, plan: StepPlan, table_of: TableOf) -> None:
        """Take over which requests a plan starts and ends. `table_of` returns a request's page table."""

    @abstractmethod
    def computed(self, plan: StepPlan) -> None:
        """Take over which tokens a plan computes. Copies that start later come after the step's kernels."""

    @abstractmethod
    def _on_wake(self) -> None:
        """Handle what `apply` and `computed` have changed."""

    @abstractmethod
    def _process_messages(self) -> None:
        """Wait for a message or a wake-up, then handle all messages that have arrived."""

    def wake(self) -> None:
        """Make the thread call `_on_wake`."""
        self._wake_sender.send(_WAKE)

    def close(self) -> None:
        """End the thread and close its sockets."""
        self._wake_sender.send(_END)
        self._thread.join(_JOIN_SECONDS)
        self._context.destroy(linger=0)

    def _report(self, message: FromRank) -> None:
        """Send a message to the driver."""
        self._driver.send(encode(message))

    def _must_end(self) -> bool:
        """Handle all wake-ups that have arrived. True if `close` was called."""
        woken = False
        while self._wake_receiver.poll(0):
            if self._wake_receiver.recv() == _END:
                return True
            woken = True
        if woken:
            self._on_wake()
        return False

    def _run(self) -> None:
        try:
            while not self._must_end():
                self._process_messages()
        except Exception as error:  # any: the driver would not notice that the thread has ended
            self._report(TransferFailed(self._part.rank, f"{type(error).__name__}: {error}"))
