"""A `longspan serve`, or another server of the package, that a script starts, watches and ends.

It owns the process and a folder for its temporary files; what is sent to the server is the script's.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

TINY = "tiny"
MAIN = "from longspan.cli.main import main; main()"
_START_SECONDS = 600.0  # of a machine with much else to do
_END_SECONDS = 30.0
_SOURCE = Path(__file__).resolve().parent.parent


def split_options(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and what follows `--`: options of `longspan serve`."""
    own = sys.argv[1:]
    rest = own[own.index("--") + 1 :] if "--" in own else []
    return parser.parse_args(own[: own.index("--")] if "--" in own else own), rest


def model_named(name: str) -> str:
    """The model to serve. `tiny` is the tests' random Llama of 97 ASCII tokens, in a folder of this process."""
    if name != TINY:
        return name
    sys.path.insert(0, str(_SOURCE))
    from tests.server.running import ascii_folder

    return ascii_folder()


class ServerProcess:
    """A server on a free port. Its temporary files are in `folder`, its words in the file `log` there.

    `program` is Python that reads `arguments`, which `--port` follows. `open_files` is the limit on them, None for that
    of this process.
    """

    def __init__(self, program: str, arguments: Sequence[str], folder: Path, open_files: int | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.temporary = folder / "t"  # short: the paths of sockets may have 107 bytes
        self.temporary.mkdir()
        command = [sys.executable, "-c", program, *arguments, "--port", str(self.port)]
        if open_files is not None:
            command = ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh", *command]
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    @property
    def pid(self) -> int:
        """The HTTP process; core and ranks are below it."""
        return self.process.pid

    def health(self) -> int:
        """The status of `/health`, 0 if there is no answer."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10.0) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_until_healthy(self) -> None:
        """Raises `SystemExit` with the server's words if it does not start."""
        deadline = time.monotonic() + _START_SECONDS
        while self.health() != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server has not started:\n{self.log.read_text()}")
            time.sleep(0.1)

    def end(self) -> int | None:
        """Ask it to end; its exit code, or None if it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(_END_SECONDS)
        self.process.kill()
        self.process.wait()
        return None

    def left_files(self) -> list[str]:
        """Temporary files that are still there."""
        return sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))


@contextmanager
def started(program: str, arguments: Sequence[str], open_files: int | None = None) -> Iterator[ServerProcess]:
    """See `ServerProcess`. It answers, and is ended afterwards, also if this process is told to end."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="ls-") as name:
        server = ServerProcess(program, arguments, Path(name), open_files)
        try:
            server.wait_until_healthy()
            yield server
        finally:
            if server.process.poll() is None:
                server.end()


def served(model: str, options: Sequence[str], open_files: int | None = None) -> AbstractContextManager[ServerProcess]:
    """A `longspan serve` that is `started`."""
    return started(MAIN, ["serve", model_named(model), *options], open_files)


def descendants(parent: int) -> dict[int, str]:
    """The state (`R`, `S`, `T`, `Z`, ...) of each process below a process, of any generation."""
    found: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, owner, *_ = path.read_text().rsplit(")", 1)[1].split()
            found[int(path.parent.name)] = int(owner), state
    below: dict[int, str] = {}
    fresh = [parent]
    while fresh:
        fresh = [pid for pid, (owner, _) in found.items() if owner in fresh]
        below |= {pid: found[pid][1] for pid in fresh}
    return below


def resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 if it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def held(state: dict[str, Any]) -> int:
    """Pages that requests hold, by `/internal/state`."""
    return sum(shard["used"] for shard in state["shards"])
