"""Attack a server with full-size floods and measure what a well-behaved client notices.

    python scripts/attack_server.py smollm2 [--only headers,lists] [--scale 1.0] [--router] [-- SERVE OPTIONS]
    python scripts/attack_server.py --url http://127.0.0.1:8000 [--pid PID]

One server is started, unless a URL is given; with `--router` it is a decode instance behind a router, which is
attacked. Its KV cache is small, and each of its pages is used once beforehand: it is memory that a server is given, and
does not count as growth. For each attack in turn, the client's health checks and completions of one token are timed
without and with the attack; the largest memory of HTTP process and core during it is read beside them. Prints a table
and whether the bounds held: none of the client's requests failed or had another text, and no process grew by more than
its bound. Latencies are figures only. It owns the servers it starts and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from server_process import served, split_options, started

_ROUTE = (  # the command wants a prefill instance, and nothing here depends on one
    "import sys; from longspan.cli.route import route; from longspan.server.options import RouteOptions; "
    "route([], [sys.argv[1]], RouteOptions(port=int(sys.argv[3])))"
)
_ASK_SECONDS = 150.0
_CACHE = ("--kv-cache-memory-bytes", "512M")  # an option that follows takes its place
_QUIET_SECONDS = 6.0  # the client alone; also the least time it is watched under attack
_GROWTH = {"http": 512 << 20, "core": 200 << 20, "router": 320 << 20}  # in one attack; see docs/security.md
_TALK = '{"role":"user","content":"a"}'
_HEAD = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"


@dataclass
class Seen:
    """What the client and the attacker saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"/health": [], "/v1/completions": []})
    failed: int = 0
    texts: set[str] = field(default_factory=set)


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


def connected(url: str, count: int, sent: bytes, receive_buffer: int | None = None) -> list[socket.socket]:
    """Connections that have sent something."""
    place = urlsplit(url)
    opened: list[socket.socket] = []
    for _ in range(count):
        each = socket.socket()
        if receive_buffer is not None:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        each.settimeout(5.0)
        with suppress(OSError):
            each.connect((place.hostname or "", place.port or 80))
            opened.append(each)
            each.sendall(sent)
    return opened


def held(opened: list[socket.socket], seconds: float, trickle: bytes = b"") -> str:
    """Keep connections for some seconds, and send a little on each every second."""
    for _ in range(int(seconds)):
        time.sleep(1.0)
        for each in opened:
            with suppress(OSError):
                each.sendall(trickle)
    for each in opened:
        each.close()
    return f"{len(opened)} opened"


def idle(url: str, scale: float) -> str:
    """Connections that say nothing."""
    return held(connected(url, int(1100 * scale), b""), 20)


def slow_writers(url: str, scale: float) -> str:
    """Bodies that come a byte at a time."""
    return held(connected(url, int(1100 * scale), _HEAD.format(size=9999).encode() + b"{"), 20, b" ")


def pipelined(url: str, scale: float) -> str:
    """Thousands of requests at once on each connection."""
    return held(connected(url, int(200 * scale), b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 6000), 10)


def unread_pages(url: str, scale: float) -> str:
    """Pages that are asked for and not read: more of them than the kernel keeps for a client."""
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 12
    opened = connected(url, int(1100 * scale), asked, 4096)
    for _ in range(15):
        time.sleep(0.5)
        for each in opened:
            with suppress(OSError):
                each.sendall(asked)
    return held(opened, 10)


def unread_streams(url: str, scale: float) -> str:
    """Streams with log probabilities that are not read."""
    asked = json.dumps({"prompt": "a", "max_tokens": 200, "n": 2, "logprobs": 20, "stream": True})
    sent = (_HEAD.format(size=len(asked)) + asked).encode()
    return held(connected(url, int(8 * scale), sent, 4096), 20)


def posting(path: str, make: Callable[[float], bytes]) -> Callable[[str, float], str]:
    """An attack that posts a body."""
    return lambda url, scale: post(url, path, make(scale))


def grammars(form: Callable[[int], object]) -> Callable[[str, float], str]:
    """An attack that asks for answers of many schemas, one after another."""

    def run(url: str, scale: float) -> str:
        answers: list[str] = []
        for number in range(max(1, int(4 * scale))):
            wanted = {"type": "json_schema", "json_schema": {"schema": form(number)}}
            content = {"prompt": "a", "max_tokens": 8, "n": 4, "response_format": wanted}
            answers.append(post(url, "/v1/completions", json.dumps(content).encode()))
        return "/".join(sorted(set(answers)))

    return run


def names(count: int) -> dict[str, object]:
    """A schema with many optional names."""
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


def asking(**fields: object) -> Callable[[str, float], str]:
    """An attack that asks for one completion."""
    content = json.dumps({"prompt": "a", "max_tokens": 16, **fields}).encode()
    return lambda url, _: post(url, "/v1/completions", content)


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ATTACKS: dict[str, tuple[str, int, Callable[[str, float], str]]] = {
    "headers": ("endless headers, 100 MB", 4, headers),
    "pipelined": ("200 connections with 6,000 requests each", 1, pipelined),
    "lists": ("15 million lists", 1, posting(CHAT, lambda s: body('{"messages":[', "[],", int(15e6 * s), "[]]}"))),
    "keys": ("3 million unknown names", 1, posting(COMPLETION, lambda s: keys(int(3e6 * s)))),
    "ids": (
        "/detokenize, 31 million ids", 1,
        posting("/detokenize", lambda s: body('{"tokens":[', "1,", int(31e6 * s), "1]}")),
    ),
    "messages": (
        "2 million messages", 1, posting(CHAT, lambda s: body('{"messages":[', _TALK + ",", int(2e6 * s), _TALK + "]}"))
    ),
    "texts": ("20 million texts", 1, posting(COMPLETION, lambda s: body('{"prompt":[', '"",', int(2e7 * s), '""]}'))),
    "levels": ("60 million levels", 1, posting(COMPLETION, lambda s: body('{"prompt":', "[", int(6e7 * s), "}"))),
    "tools": (
        "2 million tools", 1,
        posting(CHAT, lambda s: body('{"tools":[', '{"function":{"name":"f"}},', int(2e6 * s), "1]}")),
    ),
    "wide": (
        "a text of 60 MB of which one letter is not ASCII", 8,
        posting(COMPLETION, lambda s: body('{"prompt":"\U0001f600', "a", int(6e7 * s), '"}')),
    ),
    "long": ("a text of 60 MB", 4, posting(COMPLETION, lambda s: body('{"prompt":"', "a", int(6e7 * s), '"}'))),
    "tokenize": (
        "/tokenize, 16 MB of text", 6,
        posting("/tokenize", lambda s: body('{"prompt":"', "hello world, ", int(1.25e6 * s), '"}')),
    ),
    "longest": (
        "/tokenize, the longest text that is taken", 16,
        posting("/tokenize", lambda s: body('{"prompt":"', "hello world, ", int(5_000 * s), '"}')),
    ),
    "patterns": (
        "4 schemas of 200 patterns that must all hold", 4,
        grammars(lambda n: {"allOf": [{"type": "string", "pattern": f".*{n}x{k}.*"} for k in range(200)]}),
    ),
    "optional": ("4 schemas of 1,000 optional names", 4, grammars(lambda n: {**names(1000 + n), "title": str(n)})),
    "ambiguous": (
        "4 ambiguous patterns", 4,
        grammars(lambda n: {"type": "string", "pattern": f"(.{{0,300}}a.{{0,300}}){{1,{n + 3}}}"}),
    ),
    "choices": ("n = best_of = 128 with log probabilities", 2, asking(n=128, best_of=128, logprobs=20)),
    "bias": ("1,024 biases, n = 32", 4, asking(n=32, logit_bias={str(n): -1 for n in range(1024)})),
    "biases": ("200,000 biases", 4, asking(logit_bias={str(n): -1 for n in range(200_000)})),
    "stops": ("64 stop strings of 100,000 letters", 4, asking(n=16, stop=[f"{n}" + "x" * 100_000 for n in range(64)])),
    "pages": ("1,100 clients that do not read pages", 1, unread_pages),
    "streams": ("8 streams that nobody reads", 1, unread_streams),
    "writers": ("1,100 bodies that come a byte a second", 1, slow_writers),
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
                said = json.load(answer)
            if data is not None:
                seen.texts.add(said["choices"][0]["text"])
        except (OSError, ValueError):
            seen.failed += 1
        seen.seconds[path].append(time.perf_counter() - begun)


def watch(url: str, running: Callable[[], bool]) -> Seen:
    """The client's turns for some seconds, and for as long as the attack is running."""
    seen, begun = Seen(), time.perf_counter()
    while running() or time.perf_counter() - begun < _QUIET_SECONDS:
        ask(url, seen)
        time.sleep(0.05)
    return seen


@dataclass
class Target:
    """What is attacked: its address, and its processes by what they are."""

    url: str
    processes: dict[str, int] = field(default_factory=dict)


@contextmanager
def target(options: argparse.Namespace, rest: list[str]) -> Iterator[Target]:
    """A server, and a router in front of it if one is wanted."""
    if options.url:
        yield Target(options.url, {"http": options.pid} if options.pid else {})
        return
    role = ["--role", "decode"] if options.router else []
    with served(options.model, [*role, *_CACHE, *rest], options.open_files) as server:
        use_all_pages(server.url)
        core = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0]
        processes = {"http": server.pid, "core": int(core)}
        if not options.router:
            yield Target(server.url, processes)
            return
        with started(_ROUTE, [server.url], options.open_files) as router:
            yield Target(router.url, {**processes, "router": router.pid})


def use_all_pages(url: str) -> None:
    """Compute as many different tokens as the KV cache holds."""
    with urllib.request.urlopen(f"{url}/internal/state", timeout=_ASK_SECONDS) as answer:
        layout = json.load(answer)["layout"]
    source, length = random.Random(0), layout["max_model_len"] - 1
    for _ in range(layout["capacity_tokens"] // length + 1):
        ids = [source.randrange(32, 90) for _ in range(length)]
        status = post(url, COMPLETION, json.dumps({"prompt": ids, "max_tokens": 1}).encode())
        if status != "200":
            raise SystemExit(f"a prompt of {length} tokens was answered with {status}")


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


def memory(pid: int, name: str) -> int:
    """`VmRSS` or `VmHWM`, its peak, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def attack(target: Target, count: int, run: Callable[[str, float], str], scale: float) -> tuple[list[str], list[str]]:
    """One row's figures, and the bounds that did not hold."""
    alone = watch(target.url, lambda: False)
    processes = {name: pid for name, pid in target.processes.items() if is_alive(pid)}
    before = {name: memory(pid, "VmRSS") for name, pid in processes.items()}
    for pid in processes.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts again
    answers: list[str] = []
    threads = [Thread(target=lambda: answers.append(run(target.url, scale)), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    under = watch(target.url, lambda: any(thread.is_alive() for thread in threads))
    figures = [
        f"{statistics.median(alone.seconds[path]):.3f} / {max(alone.seconds[path]):.2f} → "
        f"{statistics.median(under.seconds[path]):.3f} / {max(under.seconds[path]):.2f}"
        for path in alone.seconds
    ]
    gone = [name for name, pid in target.processes.items() if not is_alive(pid)]
    grown = {name: memory(pid, "VmHWM") - before[name] for name, pid in processes.items() if name not in gone}
    told = ", ".join(f"{answers.count(answer)} × {answer}" for answer in sorted(set(answers)))
    broken = [f"{name} grew by {size >> 20} MB" for name, size in grown.items() if size > _GROWTH[name]]
    broken += [f"the first {name} process is gone" for name in gone]
    if under.failed:
        broken.append(f"{under.failed} of the client's requests failed")
    if len(alone.texts | under.texts) > 1:
        broken.append("the client got another text")
    told_growth = ", ".join(f"{name} +{size >> 20}" for name, size in grown.items()) or "unknown"
    asked = len(under.seconds["/health"]) * 2
    return [*figures, f"{under.failed} of {asked}", told_growth, told], broken


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="of its HTTP process, for its memory")
    parser.add_argument("--router", action="store_true", help="attack a router in front of the server")
    parser.add_argument("--only", default=",".join(ATTACKS), help="names, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full sizes")
    parser.add_argument("--open-files", type=int, default=1024, help="of the servers that are started")
    options, rest = split_options(parser)
    table = Table("attack", "/health, s", "completion, s", "failed", "growth, MB", "attacker got")
    table.title = f"median / largest latency alone → under attack; {os.cpu_count()} processors, scale {options.scale:g}"
    failures: list[str] = []
    with target(options, rest) as attacked:
        for _ in range(3):
            ask(attacked.url, Seen())  # the first requests of a process are slow
        for name in options.only.split(","):
            label, count, run = ATTACKS[name]
            row, broken = attack(attacked, count, run, options.scale)
            failures += [f"{name}: {problem}" for problem in broken]
            table.add_row(f"{count} × {label}", *row)
            print(name, *row, *broken, sep=" | ", file=sys.stderr, flush=True)
    Console(width=180).print(table)
    bounds = ", ".join(f"{name} under {size >> 20} MB" for name, size in _GROWTH.items())
    print(
        f"{'FAIL' if failures else 'PASS'}: no request of the client fails; growth of {bounds}. {'; '.join(failures)}"
    )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
