"""What the two kinds of transfer threads in a rank share: a thread of its own with its own sockets.

It owns the thread's life and its words to the driver; it must not know what is moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock, Thread

import msgspec
import zmq

from longspan.cache.pages import PageTable
from longspan.config import TransferConfig
from longspan.disaggregation.messages import Broken, FromRank, encode
from longspan.disaggregation.pool_access import PoolAccess
from longspan.plan.plan import StepPlan
from longspan.plan.source import Part

_END_SECONDS = 5.0
_WAKE, _END = b"", b"end"
TableOf = Callable[[str], PageTable]


class TransferThread(ABC):
    """One rank's part in moving pages, beside its steps.

    The rank's own thread calls `apply` when it has taken in a plan, before it computes, and `computed` when the step is
    launched. `lock` guards what both threads touch: while it is held no page of a request changes hands.
    """

    def __init__(self, part: Part, access: PoolAccess, config: TransferConfig) -> None:
        self._part = part
        self._access = access
        self._config = config
        self._lock = Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._woken = self._context.socket(zmq.PULL)
        self._woken.bind("inproc://wake")
        self._waking = self._context.socket(zmq.PUSH)
        self._waking.connect("inproc://wake")
        self._driver = self._context.socket(zmq.PUSH)
        self._driver.connect(config.control_address)
        self._thread = Thread(target=self._run, name=f"longspan-transfer-{part.rank}", daemon=True)

    @abstractmethod
    def apply(self, plan: StepPlan, table_of: TableOf) -> None:
        """Take in what a plan begins and ends."""

    @abstractmethod
    def computed(self, plan: StepPlan) -> None:
        """A step's KV is in the pool, or will be for copies that come behind it."""

    @abstractmethod
    def _woke(self) -> None:
        """`wake` was called."""

    @abstractmethod
    def _listen(self) -> None:
        """Until something comes through the sockets, then answer all of it."""

    def wake(self) -> None:
        """From the rank's thread: there is news."""
        self._waking.send(_WAKE)

    def close(self) -> None:
        """From the rank's thread: end."""
        self._waking.send(_END)
        self._thread.join(_END_SECONDS)
        self._context.destroy(linger=0)

    def _tell(self, message: FromRank) -> None:
        self._driver.send(encode(message))

    def _is_over(self) -> bool:
        """Take in every wake-up; True: end."""
        woken = False
        while self._woken.poll(0):
            if self._woken.recv() == _END:
                return True
            woken = True
        if woken:
            self._woke()
        return False

    def _run(self) -> None:
        try:
            while not self._is_over():
                self._listen()
        except Exception as error:  # whatever it is, nobody else would hear of it
            self._tell(Broken(self._part.rank, f"{type(error).__name__}: {error}"))


def decoded(data: bytes, kind: object) -> msgspec.Struct | None:
    """A message; None for bytes that are none, whoever made them up."""
    try:
        message: msgspec.Struct = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return message
