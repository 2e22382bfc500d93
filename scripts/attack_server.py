"""Attack a server with full-size floods and measure what a well-behaved client notices.

    python scripts/attack_server.py smollm2 [--only headers,lists] [--scale 1.0] [--open-files 1024] [-- SERVE OPTIONS]
    python scripts/attack_server.py --url http://127.0.0.1:8000 [--pid PID]

For each attack a server is started, unless a URL is given. In turn, the client's health checks and completions of one
token are timed without and with the attack; the server's largest memory is read beside them. Prints a table. It owns
the servers it starts and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

_MAIN = "from longspan.cli.main import main; main()"
_START_SECONDS = 180.0
_ASK_SECONDS = 150.0
_QUIET_SECONDS = 6.0  # the client alone; also the least time it is watched under attack
_TALK = '{"role":"user","content":"a"}'


@dataclass
class Seen:
    """What the client and the attacker saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"/health": [], "/v1/completions": []})
    failed: int = 0


def body(begin: str, part: str, count: int, end: str) -> bytes:
    """JSON with a part that repeats."""
    return (begin + part * count + end).encode()


def keys(count: int) -> bytes:
    """An object of unknown names."""
    return ("{" + ",".join(f'"k{number}":1' for number in range(count)) + "}").encode()


def post(url: str, path: str, content: bytes) -> str:
    """How a body was answered: the status, or the error."""
    request = urllib.request.Request(url + path, content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as answer:
            answer.read()
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return type(error).__name__


def headers(url: str, scale: float) -> str:
    """A header of 100 MB that does not end."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname or "", place.port or 80), timeout=_ASK_SECONDS) as opened:
        with suppress(OSError):
            opened.sendall(b"GET / HTTP/1.1\r\nx: ")
            for _ in range(int(100 * scale)):
                opened.sendall(b"a" * (1 << 20))
        opened.settimeout(1.0)
        with suppress(OSError):
            return (opened.recv(64).split() or [b"", b"closed"])[1].decode()
    return "no answer"


def idle(url: str, scale: float) -> str:
    """Connections that say nothing."""
    place = urlsplit(url)
    opened: list[socket.socket] = []
    for _ in range(int(1100 * scale)):
        with suppress(OSError):
            opened.append(socket.create_connection((place.hostname or "", place.port or 80), timeout=5.0))
    time.sleep(20.0)
    for each in opened:
        each.close()
    return f"{len(opened)} opened"


def posting(path: str, make: Callable[[float], bytes]) -> Callable[[str, float], str]:
    """An attack that posts a body."""
    return lambda url, scale: post(url, path, make(scale))


ATTACKS: dict[str, tuple[str, int, Callable[[str, float], str]]] = {
    "headers": ("endless headers, 100 MB", 4, headers),
    "lists": (
        "15 million lists", 1,
        posting("/v1/chat/completions", lambda s: body('{"messages":[', "[],", int(15e6 * s), "[]]}")),
    ),
    "keys": ("3 million unknown names", 1, posting("/v1/completions", lambda s: keys(int(3e6 * s)))),
    "ids": (
        "/detokenize, 31 million ids", 1,
        posting("/detokenize", lambda s: body('{"tokens":[', "1,", int(31e6 * s), "1]}")),
    ),
    "messages": (
        "2 million messages", 1,
        posting("/v1/chat/completions", lambda s: body('{"messages":[', _TALK + ",", int(2e6 * s), _TALK + "]}")),
    ),
    "tokenize": (
        "/tokenize, 16 MB of text", 6,
        posting("/tokenize", lambda s: body('{"prompt":"', "hello world, ", int(1.25e6 * s), '"}')),
    ),
    "idle": ("1,100 idle connections", 1, idle),
}  # fmt: skip


def ask(url: str, seen: Seen) -> None:
    """One turn of the well-behaved client."""
    content = json.dumps({"prompt": "two words", "max_tokens": 1, "temperature": 0}).encode()
    for path, data in (("/health", None), ("/v1/completions", content)):
        begun = time.perf_counter()
        try:
            request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as answer:
                answer.read()
        except OSError:
            seen.failed += 1
        seen.seconds[path].append(time.perf_counter() - begun)


def watch(url: str, running: Callable[[], bool]) -> Seen:
    """The client's turns for some seconds, and for as long as the attack is running."""
    seen, begun = Seen(), time.perf_counter()
    while running() or time.perf_counter() - begun < _QUIET_SECONDS:
        ask(url, seen)
        time.sleep(0.05)
    return seen


@contextmanager
def served(options: argparse.Namespace, rest: list[str]) -> Iterator[tuple[str, int | None]]:
    """A server's address and process."""
    if options.url:
        yield options.url, options.pid
        return
    port = str(options.port)
    command = [sys.executable, "-c", _MAIN, "serve", options.model, "--port", port, *rest]
    limit = f'ulimit -n {options.open_files}; exec "$@"'
    server = subprocess.Popen(["sh", "-c", limit, "sh", *command], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
                if answer.status == 200:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server has not started")
            time.sleep(0.2)
        yield url, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def peak_bytes(pid: int | None) -> int:
    """The most memory the HTTP process has held; the core is another one."""
    if pid is None:
        return 0
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def attack(url: str, pid: int | None, count: int, run: Callable[[str, float], str], scale: float) -> list[str]:
    """One row's figures."""
    for _ in range(3):
        ask(url, Seen())  # the first requests of a process are slow
    alone, before = watch(url, lambda: False), peak_bytes(pid)
    answers: list[str] = []
    ready = Event()

    def attacker() -> None:
        ready.wait()
        answers.append(run(url, scale))

    threads = [Thread(target=attacker, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    ready.set()
    under = watch(url, lambda: any(thread.is_alive() for thread in threads))
    figures = [
        f"{statistics.median(alone.seconds[path]):.3f} / {max(alone.seconds[path]):.2f} → "
        f"{statistics.median(under.seconds[path]):.3f} / {max(under.seconds[path]):.2f}"
        for path in alone.seconds
    ]
    memory = f"{before / 1e9:.2f} → {peak_bytes(pid) / 1e9:.2f}" if pid else "unknown"
    told = ", ".join(f"{answers.count(answer)} × {answer}" for answer in sorted(set(answers)))
    return [*figures, str(under.failed), memory, told]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="of its HTTP process, for its memory")
    parser.add_argument("--only", default=",".join(ATTACKS), help="names, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full sizes")
    parser.add_argument("--open-files", type=int, default=1024, help="of the servers that are started")
    parser.add_argument("--port", type=int, default=8791)
    own = sys.argv[1:]
    rest = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    table = Table("attack", "/health, s", "completion, s", "failed", "peak RSS, GB", "attacker got")
    table.title = f"median / largest latency alone → under attack; {os.cpu_count()} processors, scale {options.scale:g}"
    for name in options.only.split(","):
        label, count, run = ATTACKS[name]
        with served(options, rest) as (url, pid):
            row = attack(url, pid, count, run, options.scale)
        table.add_row(f"{count} × {label}", *row)
        print(name, *row, sep=" | ", file=sys.stderr, flush=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
