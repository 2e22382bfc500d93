"""A server on several hosts, each with its own address: the same texts as on one host, also when a host dies.

It starts three Ray nodes, which takes longer than any other test; `make test` leaves it to `pytest -m exhaustive`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from tests.ray.hosts import Host, hosts, why_not
from tests.server.running import ascii_folder, expected

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
PATIENCE = 120.0
RAY = [
    sys.executable,
    "-c",
    "from ray.scripts.scripts import main; main()",
    "start",
    "--disable-usage-stats",
    "--block",
]
LONGSPAN = [sys.executable, "-c", "from longspan.cli.main import main; main()"]
OPEN = {"RAY_AUTH_MODE": "disabled"}  # no other machine reaches these hosts
TOKENS = 200
PROMPTS = [f"request number {number} " * 2 for number in range(3)]


@pytest.fixture
def logs() -> Iterator[Path]:
    """A folder for the output of the hosts, printed after a failed test. Ray's sockets need its short name."""
    with TemporaryDirectory(prefix="ls-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
        for path in sorted(Path(folder).glob("*.log")):
            print(f"--- {path.name}\n{path.read_text()[-3000:]}")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.1)


@contextmanager
def serving(host: Host, logs: Path, *options: str) -> Iterator[str]:
    """Starts a server on a host; gives its URL once it is healthy."""
    url = f"http://{host.address}:8000"
    model = [ascii_folder(), "--served-model-name", "tiny", "--host", host.address, "--port", "8000"]
    sizes = ["--page-size", "4", "--kv-cache-memory-bytes", "1M", "--local-context", "8", "--num-threads", "1"]
    sizes += ["--dtype", "float32"]
    host.run([*LONGSPAN, "serve", *model, *sizes, *options], OPEN, logs / "server.log")
    with host.threads(1) as there:
        until(lambda: there.submit(healthy, url).result(), "the server")
    yield url


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def stream_text(url: str, prompt: str, on_text: Callable[[str], None] = lambda text: None) -> str:
    """The text of a streamed completion; fails if the stream has an error event."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                on_text(text)
    return text


def ray_cluster(head: Host, others: list[Host], logs: Path) -> str:
    """Starts Ray on all hosts; returns the address. The head has CPUs for no rank, each other host for two."""
    address = f"{head.address}:6379"
    join(head, logs, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={logs}/ray", "--num-cpus=0")
    for host in others:
        join(host, logs, f"--address={address}", "--num-cpus=2")
    return address


def join(host: Host, logs: Path, *options: str) -> None:
    log = logs / f"{host.address}.log"
    host.run([*RAY, f"--node-ip-address={host.address}", *options], OPEN, log)
    until(lambda: "Ray runtime started" in log.read_text(), f"Ray on {host.address}")


@pytest.mark.exhaustive
def test_a_server_on_several_hosts_gives_the_texts_of_one_host_also_when_a_host_dies(logs):
    killed: list[float] = []
    with hosts(3) as (head, first, second):
        address = ray_cluster(head, [first, second], logs)
        layout = ["-pcp", "2", "--ranks-per-node", "1", "--executor", "ray", "--ray-address", address]
        with serving(head, logs, *layout) as url, head.threads(3) as clients:
            assert all("RankActor" in commands(host) for host in (first, second))

            def kill(text: str) -> None:
                if len(text) > 20 and not killed:
                    killed.append(time.monotonic())
                    second.kill()

            texts = list(clients.map(lambda prompt: stream_text(url, prompt, kill), PROMPTS))
    assert killed
    assert texts == [expected(prompt, TOKENS) for prompt in PROMPTS]


def commands(host: Host) -> str:
    return " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in host.process_ids)
