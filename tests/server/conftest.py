"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """Two ranks share a prompt; the model is tiny."""
    with running(prefill_context_parallel_size=2) as started:
        yield started
