"""Servers that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longspan.config import LivenessConfig
from tests.server.running import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """For all tests that leave it as it was: two ranks share a prompt; the model is tiny."""
    with running(prefill_context_parallel_size=2) as started:
        yield started


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[Running]:
    """For tests that kill or stop its core or a rank, each a process, and leave it mended."""
    quick = LivenessConfig(heartbeat_interval=0.1, heartbeat_late=0.5, heartbeat_timeout=3.0)
    with running(executor="processes", liveness=quick, prefill_context_parallel_size=2) as started:
        yield started
