"""Servers and routers in processes of their own, as a user starts them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Thread

PATIENCE = 240.0  # of a machine with much else to do
SERVE = "from longspan.cli.main import main; main()"
ROUTE = "import sys; sys.argv.insert(1, 'route'); from longspan.cli.main import main; main()"
READY = re.compile(r"(?:serving \S+|routing) at (http://\S+)")


@dataclass
class Started:
    """A process. `lines` is its error output; `url` waits until it prints the address that it serves."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    urls: Queue[str | None] = field(default_factory=Queue)
    found: str | None = None

    def read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if match := READY.search(line):
                self.urls.put(match[1])
        self.urls.put(None)

    def url(self) -> str:
        with suppress(Empty):
            self.found = self.found or self.urls.get(timeout=PATIENCE)
        assert self.found, self.text
        return self.found

    @property
    def text(self) -> str:
        return "".join(self.lines)


def start(program: str, arguments: Sequence[str]) -> Started:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = Started(process)
    Thread(target=started.read, daemon=True).start()
    return started


@contextmanager
def ended(*running: Started) -> Iterator[None]:
    """Terminates processes at the end of the block, and kills those that do not end."""
    try:
        yield
    finally:
        for started in running:
            if started.process.poll() is None:
                started.process.terminate()
        for started in running:
            try:
                started.process.wait(15)
            except subprocess.TimeoutExpired:
                started.process.kill()
                started.process.wait()


def serve_arguments(model: str, *more: str) -> list[str]:
    return [
        "serve", model, "--port", "0", "--served-model-name", "tiny", "--num-threads", "1", "--page-size", "4",
        "--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "1M",
        "--local-context", "8", "--dtype", "float32", *more,
    ]  # fmt: skip
