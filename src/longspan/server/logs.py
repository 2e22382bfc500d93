"""The log of a server or router: where it goes, in which form, and its line of throughput.

It owns the form of lines; what they say of requests is `request_log`'s.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from longspan.server.options import LogOptions

if TYPE_CHECKING:  # a router needs no metrics
    from longspan.server.metrics import Metrics

_SECONDS = 10.0  # between two lines of throughput
_LOG = logging.getLogger("longspan.server")


def configure(options: LogOptions) -> None:
    """Write the log to stderr: Longspan's lines from the level on, and warnings of libraries."""
    form = "%(levelname)s %(asctime)s longspan: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%m-%d %H:%M:%S")
    logging.getLogger("longspan").setLevel(options.level.upper())


class ThroughputLog:
    """Logs, while there is work, what was done since the last line. `tick` must be called once a second."""

    def __init__(self, metrics: Metrics, interval: float = _SECONDS) -> None:
        self._metrics = metrics
        self._interval = interval
        self._last = (time.monotonic(), 0, 0)

    def tick(self) -> None:
        """Log a line if one is due."""
        now, metrics, (before, prompts, outputs) = time.monotonic(), self._metrics, self._last
        seconds, totals, load = now - before, metrics.totals, metrics.load.scheduler
        if seconds < self._interval:
            return
        self._last = (now, totals["prompt_tokens"], totals["output_tokens"])
        done = (totals["prompt_tokens"] - prompts, totals["output_tokens"] - outputs)
        if not (any(done) or load.running or load.waiting):
            return
        _LOG.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            done[0] / seconds, done[1] / seconds, load.running, load.waiting, 100 * metrics.kv_usage,
            100 * metrics.prefix_hit_rate,
        )  # fmt: skip
