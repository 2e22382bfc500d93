"""Send ten thousand hostile requests to servers, and see that nothing breaks, hangs, leaks or is left behind.

    python scripts/fuzz_server.py tiny --requests 10000 --seed 1 [--only plain,pcp] -- --max-model-len 128

For each set of options a server is started (the model `tiny` is the tests' own); what follows `--` is added to them. A
short context keeps requests short. A third of the requests is generated
by schemathesis from the server's OpenAPI document, if it is installed (`pip install schemathesis`; the project does not
depend on it); the others are the corpus and the shapes of HTTP of `tests/server`, wrong values in every field, and
mutations of valid bodies by clients that sometimes leave. The exit code is 1 if an answer is a 5xx, is missing or has
an error of another shape, if the log has a traceback, the engine was restarted, pages are held or requests unfinished,
a completion changes, or memory grows. A request at fault is printed, so that it can be put into the corpus.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from server_process import ServerProcess, descendants, resident_bytes, served, split_options
from yarl import URL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.server.hostile import BODIES, SHAPES, VALUES, Hostile, Shape, corpus, exchange, fault_of, mutated

SETS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "pcp": ("-pcp", "2", "--executor", "processes"),
    "speculation": ("--speculative", "prompt-lookup:4"),
    # 512 tokens of the tiny model, so that pages are evicted and requests preempted
    "offload": ("--kv-cache-memory-bytes", "128k", "--kv-offload-memory", "1M"),
}
_CLIENTS = 8
_ANSWER_SECONDS = 120.0
_CONTROL = [{"prompt": text, "max_tokens": 12, "temperature": 0} for text in ("abc", "Once upon a time", "x" * 90)]
_WARM_SHARE = 0.3  # of the requests, after which memory is measured for the first time


@dataclass
class Outcome:
    """What one set of options came to."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    # bytes of the HTTP process and of the processes below it, warm and at the end
    memory: list[tuple[int, int]] = field(default_factory=list)


def from_schema(document: dict[str, Any], count: int, seed: int) -> list[Hostile]:
    """Requests made by schemathesis, valid and not; none without it."""
    try:
        import hypothesis
        import requests
        from schemathesis import GenerationMode
        from schemathesis.openapi import from_dict
    except ImportError as error:
        Console(stderr=True).print(f"without requests from the OpenAPI document ({error}): pip install schemathesis")
        return []
    found: list[Hostile] = []
    operations = [result.ok() for result in from_dict(document).get_all_operations()]
    weights = [10 if operation.method == "post" else 1 for operation in operations]
    modes = len(GenerationMode)
    kinds = range(len(operations) * modes)
    chosen = Counter(random.Random(seed).choices(kinds, [weights[kind // modes] for kind in kinds], k=count))
    for number, times in chosen.items():
        mode = list(GenerationMode)[number % modes]

        @hypothesis.seed(seed + number)
        @hypothesis.settings(
            max_examples=times, database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(operations[number // modes].as_strategy(generation_mode=mode))
        def collect(case: Any) -> None:
            made = requests.Request(**case.as_transport_kwargs(base_url="http://x")).prepare()
            body = made.body if isinstance(made.body, bytes) else (made.body or "").encode(errors="surrogatepass")
            headers = tuple((name, value) for name, value in made.headers.items() if name.startswith("Content-Type"))
            found.append(Hostile(made.path_url, body, made.method or "GET", headers))

        with suppress(hypothesis.errors.Unsatisfiable):  # an operation without parameters has no wrong ones
            collect()
    return found


def wrong_fields() -> list[Hostile]:
    """Every value in every field."""
    valid = {"prompt": "abc", "messages": [{"role": "user", "content": "hi"}], "tokens": [1], "max_tokens": 2}
    found = []
    for path, body in BODIES.items():
        least = {name: value for name, value in valid.items() if name in body.model_fields}
        if path == "/tokenize":
            del least["messages"]
        found += [
            Hostile(path, json.dumps({**least, name: value}).encode()) for name in body.model_fields for value in VALUES
        ]
    return found


def likely(source: random.Random, made: Hostile) -> Hostile:
    """Half of what a schema yields, with a prompt and a length that the model takes: it is to reach the engine."""
    if made.method != "POST" or source.random() < 0.5:
        return made
    try:
        body = json.loads(made.body)
    except ValueError:
        return made
    if not isinstance(body, dict):
        return made
    valid = {"prompt": "abc", "messages": [{"role": "user", "content": "hi"}], "tokens": [1], "model": None}
    body |= {name: value for name, value in valid.items() if name in body}
    bounds = {"max_tokens": 20, "n": 3, "logprobs": 5, "top_logprobs": 5, "max_completion_tokens": 9}
    for name, most in bounds.items():
        if isinstance(body.get(name), int) and not isinstance(body[name], bool):
            body[name] = 1 + abs(body[name]) % most
    return Hostile(made.path, json.dumps(body).encode(), made.method, made.headers)


def all_requests(document: dict[str, Any], count: int, seed: int) -> list[Hostile | Shape]:
    """So many requests, in random order."""
    source = random.Random(seed)
    found: list[Hostile | Shape] = [likely(source, made) for made in from_schema(document, count // 3, seed)]
    found += [request for _, request in corpus()]
    found += SHAPES
    fields = wrong_fields()
    found += source.sample(fields, min(len(fields), count // 4))
    source.shuffle(found)
    found = found[:count] + [mutated(source) for _ in range(count - len(found))]
    source.shuffle(found)
    return found


class Fuzz:
    """One server's requests."""

    def __init__(self, server: ServerProcess, rest: Iterator[Hostile | Shape], total: int, progress: Progress) -> None:
        self.outcome = Outcome()
        self._server = server
        self._requests = rest
        self._total = total
        self._sent = 0
        self._progress = progress
        self._bar = progress.add_task("requests", total=total)

    async def run(self) -> Outcome:
        """Send all requests; what came of it."""
        begun = time.monotonic()
        timeout = aiohttp.ClientTimeout(_ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as self._http:
            control = [await self._control(body) for body in _CONTROL]
            await asyncio.gather(*(self._client() for _ in range(_CLIENTS)))
            self.outcome.seconds = time.monotonic() - begun
            again = [await self._control(body) for body in _CONTROL]
        if again != control:
            self.outcome.faults.append(f"completions have changed: {control} → {again}")
        self._weigh()
        return self.outcome

    async def _client(self) -> None:
        for request in self._requests:
            try:
                fault = await (self._shape(request) if isinstance(request, Shape) else self._send(request))
            except (TimeoutError, OSError, aiohttp.ClientError) as error:
                fault = f"no answer: {type(error).__name__} {error}"
            if fault:
                self.outcome.faults.append(f"{fault}\n    {request}")
                print(self.outcome.faults[-1], flush=True)
            self._sent += 1
            if self._sent % 500 == 0:
                print(f"{self._sent} sent, {len(self.outcome.faults)} faults", file=sys.stderr, flush=True)
            if self._sent == int(self._total * _WARM_SHARE):
                self._weigh()
            self._progress.update(self._bar, advance=1, description=f"{len(self.outcome.faults)} faults")

    async def _shape(self, shape: Shape) -> str | None:
        self.outcome.statuses["a shape of HTTP"] += 1
        return await asyncio.to_thread(exchange, self._server.port, shape)

    async def _send(self, request: Hostile) -> str | None:
        headers = {"Content-Type": "application/json", **dict(request.headers)}
        url = URL(self._server.url + request.path, encoded=True)
        try:
            sending = self._http.request(request.method, url, data=request.body, headers=headers)
        except ValueError:  # a header or method that the client does not send
            self.outcome.statuses["not sent"] += 1
            return None
        async with sending as answer:
            if request.leaves_after is not None:
                if request.leaves_after:
                    await answer.content.read(request.leaves_after)
                answer.close()
                self.outcome.statuses["left"] += 1
                return fault_of(answer.status, "", b"", complete=False)
            self.outcome.statuses[str(answer.status)] += 1
            kind = answer.headers.get("content-type", "")
            return fault_of(answer.status, kind, await answer.read(), complete=request.method != "HEAD")

    async def _control(self, body: dict[str, Any]) -> str:
        async with self._http.post(f"{self._server.url}/v1/completions", json=body) as answer:
            return str((await answer.json())["choices"][0]["text"])

    def _weigh(self) -> None:
        below = sum(resident_bytes(pid) for pid in descendants(self._server.pid))
        self.outcome.memory.append((resident_bytes(self._server.pid), below))


def fetch(url: str) -> str:
    """A text of the server."""
    with urllib.request.urlopen(url, timeout=30.0) as answer:
        return str(answer.read().decode())


def left_behind(server: ServerProcess) -> list[str]:
    """What `/metrics` says should not be there once all requests have ended."""
    gauges = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
    lines = [line for line in fetch(f"{server.url}/metrics").splitlines() if not line.startswith("#")]
    missing = [f"no {name}" for name in gauges if not any(name in line for line in lines)]
    watched = (*gauges, "engine_restarts_total")  # a counter is not there before it has counted
    return missing + [line for line in lines if any(name in line for name in watched) and float(line.split()[-1])]


def attack(model: str, options: Sequence[str], arguments: argparse.Namespace) -> Outcome:
    """All requests against one server."""
    with served(model, options) as server:
        document = json.loads(fetch(f"{server.url}/openapi.json"))
        found = all_requests(document, arguments.requests, arguments.seed)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            outcome = asyncio.run(Fuzz(server, iter(found), len(found), progress).run())
        time.sleep(1.0)
        outcome.faults += [f"left behind: {line}" for line in left_behind(server)]
        if server.end() != 0:
            outcome.faults.append("the server did not end as it should")
        log = server.log.read_text()
        if "Traceback" in log:
            outcome.faults.append(f"the log has a traceback: {log[log.index('Traceback') - 500 :][:3000]}")
    for name, before, after in zip(("the HTTP process", "core and ranks"), *outcome.memory, strict=True):
        if after - before > arguments.growth << 20:
            outcome.faults.append(f"{name} grew from {before >> 20} to {after >> 20} MB")
    return outcome


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="as for `longspan serve`; `tiny` is the tests' model")
    parser.add_argument("--requests", type=int, default=10_000, help="to each server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SETS), help="sets of options, separated by commas")
    parser.add_argument("--growth", type=int, default=150, help="MB that a process may grow once it is warm")
    arguments, rest = split_options(parser)
    table = Table("options", "requests", "seconds", "answers", "HTTP process, MB", "core and ranks, MB", "faults")
    faults: list[str] = []
    for name in arguments.only.split(","):
        outcome = attack(arguments.model, [*SETS[name], *rest], arguments)
        sizes = [" → ".join(str(size >> 20) for size in sizes) for sizes in zip(*outcome.memory, strict=True)]
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(outcome.statuses.items()))
        row = (str(outcome.statuses.total()), f"{outcome.seconds:.0f}", answers, *sizes, str(len(outcome.faults)))
        table.add_row(name, *row)
        print(name, *row, sep=" | ", file=sys.stderr, flush=True)  # at once: the next set may take long
        faults += outcome.faults
        print(*outcome.faults, sep="\n", flush=True)
    Console(width=160).print(table)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
