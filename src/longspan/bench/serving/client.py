"""Send a load to an OpenAI-compatible server and record when each token arrives.

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
_IDLE_S = 2.0  # shorter than servers' keep-alive, so that no request is sent on a connection that they are closing
_READ = 1 << 20  # bytes of a stream that are buffered before reading pauses


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(frozen=True)
class Target:
    """The server under test, and the options of all requests. Raises `ConfigError`."""

    # with or without /v1
    base_url: str
    # the name that requests ask for
    model: str
    # one of `ENDPOINTS`
    endpoint: str = "completions"
    # 0 is greedy
    temperature: float = 0.0
    # whether to ask for exactly `max_tokens` tokens
    ignore_eos: bool = True
    # limit on the seconds of one request
    timeout_s: float = 600.0
    # the server's API key; not shown in reports
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
        """Headers of every request. They ask for uncompressed answers."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        return headers if self.api_key is None else {**headers, "authorization": f"Bearer {self.api_key}"}

    def options(self) -> dict[str, Any]:
        """The fields for a report: all except the key."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "api_key"}
        return {**shown, "base_url": self.root}

    def session(self) -> aiohttp.ClientSession:
        """A session for all requests, without limits on time or connections.

        It keeps no cookies, because a load balancer's cookie would bind all requests to one replica.
        """
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S), timeout=aiohttp.ClientTimeout(),
            headers=self.headers, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=_READ,
        )  # fmt: skip

    async def first_model(self) -> str:
        """The first model that the server lists. Raises `ConfigError`."""
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
        """The JSON body of a request."""
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
    """Why a request failed."""

    # the kind by which failures are counted
    kind: str
    # the error's message
    detail: str


@dataclass(frozen=True)
class Outcome:
    """The result of one request. Times are seconds of one clock."""

    # when it was to be sent
    due_s: float
    # when it was sent
    start_s: float
    # when each chunk with a token arrived
    chunk_times: tuple[float, ...]
    # tokens of the prompt: the server's count, else the number of ids sent
    prompt_tokens: int
    # tokens generated: the server's count, else the number of chunks with a token
    output_tokens: int
    # `max_tokens` of the request
    asked_tokens: int
    # whether `output_tokens` was counted here, because the server sent no usage
    counted: bool
    # None if it completed
    failure: Failure | None


@dataclass(frozen=True)
class Finished:
    """The result of one run."""

    # in the order of the requests
    outcomes: tuple[Outcome, ...]
    # wall-clock time of the run
    seconds: float
    # the most requests in flight at the same time
    peak: int
    # CPU seconds of this process over `seconds`
    client_cpu: float


@dataclass(frozen=True)
class _Job:
    # seconds from the start of the run to the request
    arrival_s: float
    # JSON, ready to send
    body: bytes
    # 0 for a prompt that is text
    prompt_tokens: int
    # tokens asked for
    max_tokens: int


async def run_load(
    target: Target, requests: Iterable[LoadRequest], concurrency: int | None, on_done: Callable[[int, int], None]
) -> Finished:
    """Send every request at its arrival time, with at most `concurrency` in flight. Failures become outcomes too.

    `on_done(ended, total)` is called after each request. All bodies are made before the clock starts, which takes about
    six bytes of memory for each token of all prompts.
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
    """Sends the requests of one run and counts those in flight."""

    def __init__(
        self, target: Target, session: aiohttp.ClientSession, concurrency: int, on_done: Callable[[int], None]
    ) -> None:
        self.peak = self._running = self._done = 0
        self._session, self._timeout_s, self._on_done = session, target.timeout_s, on_done
        self._url = target.root + ENDPOINTS[target.endpoint]
        self._gate = asyncio.Semaphore(concurrency)

    async def one(self, job: _Job, due_s: float) -> Outcome:
        """Wait until the job is due and the concurrency allows it, then send it and wait for its end."""
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
