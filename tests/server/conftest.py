"""Servers that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longspan.config import LivenessConfig, Speculation
from longspan.server.options import ServeOptions
from tests.server.running import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """For all tests that leave it as it was: two ranks share a prompt; the model is tiny."""
    with running(prefill_context_parallel_size=2) as started:
        yield started


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """For tests that leave it as it was: it has a key, small bodies, and a template and defaults of its own."""
    folder = tmp_path_factory.mktemp("model-files")
    (folder / "own.jinja").write_text("own: {{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}")
    (folder / "generation_config.json").write_text('{"temperature": 0.0, "top_k": 5, "max_new_tokens": 1}')
    options = ServeOptions(
        port=0, api_key="sesame", served_model_name="tiny", max_body_bytes=1000, allowed_origins=("https://a.example",),
        chat_template=str(folder / "own.jinja"), trust_request_chat_template=True, generation_config=str(folder),
    )  # fmt: skip
    with running(options=options) as started:
        yield started


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[Running]:
    """For tests that kill or stop its core or a rank, each a process, and leave it mended."""
    quick = LivenessConfig(heartbeat_interval=0.1, heartbeat_late=0.5, heartbeat_timeout=3.0)
    lookup = Speculation("prompt-lookup", 3)
    with running(executor="processes", liveness=quick, prefill_context_parallel_size=2, speculative=lookup) as started:
        yield started
