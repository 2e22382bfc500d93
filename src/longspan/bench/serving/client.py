"""Sends a load to an OpenAI-compatible server and notes when each token comes back.

It owns connections, the clock and the kinds of failure; it must not know how prompts are made or results shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from longspan.bench.serving.dataset import LoadRequest
from longspan.bench.serving.stream import StreamedReply, error_message
from longspan.config import require, require_choice
from longspan.errors import ConfigError

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_OK = 200
_IDLE_S = 2.0  # shorter than servers', so that no request is sent into a connection that they are closing
_READ = 1 << 20  # bytes of a stream that wait here before its server is held back


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True)
class Target:
    """Where requests go and how; `timeout_s` bounds a request as a whole. Raises `ConfigError`."""

    base_url: str
    model: str
    endpoint: str = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_choice("endpoint", self.endpoint, tuple(ENDPOINTS))
        require(self.timeout_s > 0, "timeout", self.timeout_s, "must be more than 0", "give seconds")
        require(self.temperature >= 0, "temperature", self.temperature, "must not be negative", "give 0 or more")
        printable = self.api_key is None or self.api_key.isprintable()
        require(printable, "api_key", "(hidden)", "holds a line break or the like", "give the key alone")
        _server_root(self.base_url)

    @property
    def root(self) -> str:
        """The server's address, without /v1 or a slash at its end."""
        return _server_root(self.base_url)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request; answers come uncompressed."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        return headers if self.api_key is None else {**headers, "authorization": f"Bearer {self.api_key}"}

    def options(self) -> dict[str, Any]:
        """What a report tells of the target: everything but the key."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "api_key"}
        return {**shown, "base_url": self.root}

    def session(self) -> aiohttp.ClientSession:
        """What all requests share. It bounds neither time nor connections, and keeps no cookie that binds a replica."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S), timeout=aiohttp.ClientTimeout(),
            headers=self.headers, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=_READ,
        )  # fmt: skip

    async def first_model(self) -> str:
        """The first model the server lists. Raises `ConfigError`."""
        try:
            async with (
                asyncio.timeout(self.timeout_s), self.session() as session,
                session.get(f"{self.root}/v1/models", allow_redirects=False) as response,
            ):  # fmt: skip
                answer = await response.read()
            if response.status == _OK:
                return msgspec.json.decode(answer, type=_Models).data[0].id
            problem = f"HTTP {response.status}"
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError, LookupError) as error:
            problem = str(error) or type(error).__name__
        problem = f"GET /v1/models names no model ({problem})"
        raise ConfigError("base_url", self.root, problem, "start the server there, or give --model")

    def body(self, request: LoadRequest) -> bytes:
        """The JSON that asks for `request`."""
        prompt = request.prompt
        asks = {"messages": [{"role": "user", "content": prompt}]} if self.endpoint == "chat" else {"prompt": prompt}
        body = {
            "model": self.model, **asks, "max_tokens": request.max_tokens, "temperature": self.temperature,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return msgspec.json.encode({**body, "ignore_eos": True} if self.ignore_eos else body)


def _server_root(base_url: str) -> str:
    remedy = "write it as http://127.0.0.1:8000"
    try:
        url = urlsplit(base_url)
        host, _ = (url.hostname or "").encode("idna"), url.port
    except ValueError as error:
        raise ConfigError("base_url", base_url, str(error), remedy) from error
    require(url.scheme in ("http", "https"), "base_url", base_url, "is not an http address", remedy)
    require(host != b"", "base_url", base_url, "names no host", remedy)
    require("@" not in url.netloc, "base_url", base_url, "names a user", "give --api-key instead")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/').removesuffix('/v1')}"


@dataclass(frozen=True)
class Failure:
    """Why a request failed: a kind to count by, and what was said."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Outcome:
    """What came of one request. Times are seconds of one clock.

    The request was due at `due_s` and left at `start_s`; `chunk_times` has one time a chunk with a token. Tokens are
    the server's own count, or else, with `counted`, the ids sent and the chunks received.
    """

    due_s: float
    start_s: float
    chunk_times: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int
    counted: bool
    failure: Failure | None


@dataclass(frozen=True)
class Finished:
    """A run: its outcomes, wall seconds, most requests in flight, and this process' share of a CPU core."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    peak: int
    client_cpu: float


@dataclass(frozen=True)
class _Job:
    arrival_s: float
    body: bytes
    prompt_tokens: int
    max_tokens: int


async def run_load(
    target: Target, requests: Iterable[LoadRequest], concurrency: int | None, on_done: Callable[[int, int], None]
) -> Finished:
    """Send every request at its time, at most `concurrency` at once; a request that fails is an outcome too.

    `on_done` hears how many requests have ended, of how many.
    Bodies are made before the clock starts: about six bytes of memory for each token of all prompts.
    """
    jobs = [
        _Job(ask.arrival_s, target.body(ask), len(ask.prompt) if isinstance(ask.prompt, list) else 0, ask.max_tokens)
        for ask in requests
    ]
    async with target.session() as session:
        run = _Run(target, session, concurrency or len(jobs), lambda done: on_done(done, len(jobs)))
        began, cpu = time.perf_counter(), time.process_time()
        outcomes = await asyncio.gather(*(run.one(job, began + job.arrival_s) for job in jobs))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Finished(tuple(outcomes), seconds, run.peak, cpu / seconds)


class _Run:
    """One run's requests: how many are in flight, and what comes of each."""

    def __init__(
        self, target: Target, session: aiohttp.ClientSession, concurrency: int, on_done: Callable[[int], None]
    ) -> None:
        self.peak = self._running = self._done = 0
        self._session, self._timeout_s, self._on_done = session, target.timeout_s, on_done
        self._url = target.root + ENDPOINTS[target.endpoint]
        self._gate = asyncio.Semaphore(concurrency)

    async def one(self, job: _Job, due_s: float) -> Outcome:
        """Wait until the job is due and a place is free, then send it."""
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        async with self._gate:
            self._running += 1
            self.peak = max(self.peak, self._running)
            outcome = await self._send(job, due_s)
            self._running -= 1
        self._done += 1
        self._on_done(self._done)
        return outcome

    async def _send(self, job: _Job, due_s: float) -> Outcome:
        reply, start_s = StreamedReply(), time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                failure = await self._receive(job.body, reply)
        except TimeoutError:
            failure = Failure("timeout", f"no end within {self._timeout_s:g} s")
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            failure = Failure("malformed event", str(error))
        counted = reply.completion_tokens is None
        return Outcome(
            due_s, start_s, tuple(reply.chunk_times),
            job.prompt_tokens if reply.prompt_tokens is None else reply.prompt_tokens,
            len(reply.chunk_times) if reply.completion_tokens is None else reply.completion_tokens,
            job.max_tokens, counted, failure,
        )  # fmt: skip

    async def _receive(self, body: bytes, reply: StreamedReply) -> Failure | None:
        lost = None
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                if response.status != _OK:
                    return Failure(f"HTTP {response.status}", error_message(await response.read()))
                async for data in response.content.iter_any():
                    reply.feed(data, time.perf_counter())
        except aiohttp.ClientError as error:
            lost = Failure(_kind(error), str(error) or type(error).__name__)
        reply.close()
        if reply.error is not None:
            return Failure("error event", reply.error)
        if not reply.done:
            return lost or Failure("stream cut", f"ended before [DONE], after {len(reply.chunk_times)} chunks")
        return None if reply.chunk_times else Failure("empty stream", "[DONE] came before any token")


def _kind(error: aiohttp.ClientError) -> str:
    match error:
        case aiohttp.ClientConnectorError():
            return "no connection"
        case aiohttp.ClientPayloadError():
            return "stream cut"
        case aiohttp.ClientResponseError():
            return "bad HTTP"
        case _:
            return "connection lost"
