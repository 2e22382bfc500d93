"""One call of `AsyncEngine.generate`: what it waits for, and when things happened to its requests.

It owns this state; the engine changes it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from longspan.errors import LongspanError
from longspan.request import RequestOutput
from longspan.server.metrics import RequestTimes


@dataclass(eq=False)
class Call:
    """One call of `generate`. Times are in `time.monotonic()`."""

    # when the call began
    arrived: float
    # when it last yielded anything
    heard: float
    # ids of its unfinished requests
    open: set[str] = field(default_factory=set)
    # outputs that changed since it last yielded, by request id
    changed: dict[str, RequestOutput] = field(default_factory=dict)
    # when a step of the core first took up each request
    scheduled: dict[str, float] = field(default_factory=dict)
    # when each request had its first token
    first: dict[str, float] = field(default_factory=dict)
    # set when there is something to yield or raise
    event: asyncio.Event = field(default_factory=asyncio.Event)
    # the exception that ends the call
    error: LongspanError | None = None

    def times(self, request_id: str, ended: float, last: float | None = None) -> RequestTimes:
        """The times of one of its requests, whose last token came at `last`."""
        return RequestTimes(self.arrived, ended, self.scheduled.get(request_id), self.first.get(request_id), last)
