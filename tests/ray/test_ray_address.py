"""An address that is not a Ray cluster's is refused within seconds, with a remedy."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from longspan import LLM, ConfigError
from longspan.config import ClusterConfig
from tests.engine.conftest import DEFAULTS
from tests.oracle import tiny_folder

pytest.importorskip("ray", reason="Ray is not installed")
BOUND = 20.0  # seconds; Ray itself would try for minutes


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """A port that sends the first client this answer; with None it accepts the connection and sends nothing."""

    def serve() -> None:
        call, _ = server.accept()
        with call:
            call.recv(64)
            if answer is None:
                call.recv(64)
            else:
                call.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(BOUND)


def refused(address: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=rf"ray_address={address}: .*{message}"):
        LLM(tiny_folder("llama"), executor="ray", cluster=ClusterConfig(ray_address=address), **DEFAULTS)
    assert time.monotonic() - started < BOUND


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:", "127.0.0.1:99999", "no such host:6379"])
def test_an_address_where_nothing_listens_is_refused(address):
    refused(address, "no server answers there .*; give HOST:PORT")


def test_the_address_of_another_server_is_refused():
    with listener(b"HTTP/1.0 400 Bad request\r\n\r\n") as address:
        refused(address, "what answers there is not Ray")


def test_an_address_that_accepts_and_never_answers_is_refused(monkeypatch):
    monkeypatch.setattr("longspan.engine.driver.executors.ray_cluster._PROBE_SECONDS", 0.2)
    with listener(None) as address:
        refused(address, "no server answers there .*timed out")
