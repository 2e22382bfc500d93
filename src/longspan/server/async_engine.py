"""The asynchronous engine of the server: prompts in, outputs as they grow, across restarts of the core.

It owns unfinished requests, the limit on their number and their resumption after a restart; it must not know of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NoReturn

from longspan.config import EngineConfig
from longspan.disaggregation.driver import InstanceInfo
from longspan.engine.frontend.detokenizer import Tokenizer
from longspan.engine.frontend.output_processor import CoreCalls, OutputProcessor
from longspan.engine.setup import EngineSetup
from longspan.errors import EngineError, EngineUnavailable, QueueFull, RequestError, RequestTimeout
from longspan.request import FinishReason, RequestOutput, SamplingParams, TokenOutput
from longspan.server.call import Call
from longspan.server.core_client import CoreProcess
from longspan.server.logs import ThroughputLog
from longspan.server.messages import AskState, CoreReady, CoreState, Finish, NewTokens, Start
from longspan.server.metrics import Metrics

_LOG = logging.getLogger("longspan.server")
_MAX_STRIKES = 3  # a request fails when the core has failed so many times since its last token
_LONGEST_PAUSE = 5.0
_STATE_SECONDS = 0.5
_KEEP_ALIVE_SECONDS = 15.0
_FOREVER = 1e8


@dataclass(frozen=True)
class Job:
    """One prompt to complete."""

    # the prompt's tokens
    prompt_token_ids: Sequence[int]
    # sampling parameters of its completions
    params: SamplingParams
    # the prompt's text, where it has to be returned
    prompt: str | None = None
    # addresses of instances that can compute the prompt
    prefill_at: tuple[str, ...] = ()


class AsyncEngine:
    """Runs a core in another process and restarts it when it ends or hangs.

    After a restart every request continues from the tokens that it has. A request fails with `EngineUnavailable` when
    the core has failed three times without a token for it in between.
    """

    def __init__(
        self,
        setup: EngineSetup,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        max_queued_requests: int,
        request_timeout: float | None = None,
        throughput: ThroughputLog | None = None,
    ) -> None:
        self.setup = setup
        self.metrics = metrics
        self._throughput = throughput
        self.restarts = 0
        self.peer: InstanceInfo | None = None
        self.output_processor = OutputProcessor(setup, tokenizer)  # also read by `state_of` and `Server`
        self._capacity = setup.config.scheduler.running_limit + max_queued_requests
        self._timeout = _FOREVER if request_timeout is None else request_timeout
        self._core: CoreProcess | None = None
        self._calls: dict[str, Call] = {}
        self._last_token: dict[str, float] = {}
        self._strikes: dict[str, int] = {}
        self._last_state: CoreState | None = None
        self._states: list[asyncio.Future[CoreState]] = []
        self._ids = count()
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self._last_error: Exception | None = None

    @property
    def is_ready(self) -> bool:
        """Whether every rank is ready and new requests are accepted."""
        return self._ready.is_set() and not self._draining

    @property
    def trouble(self) -> str | None:
        """Why requests are not served, or why a failure is likely (a silent rank); None if all is well."""
        if self._draining:
            return "the server is shutting down"
        if self._core is None or not self._ready.is_set():
            return f"the engine starts again, after: {self._last_error}"
        return self._core.trouble

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the core and of its ranks, if those are processes."""
        return [self._core.process_id, *self._core.worker_ids] if self._core else []

    def times(self, request_id: str) -> tuple[float, float | None]:
        """When an unfinished request arrived and when it had its first token (or None), in `time.monotonic()`."""
        call = self._calls[request_id]
        return call.arrived, call.first.get(request_id)

    async def start(self) -> None:
        """Start the core and wait until every rank is ready. Raises the error that keeps it from starting."""
        core = CoreProcess(self.setup.config)
        try:
            await self._welcome(core)
        except BaseException:
            core.kill()
            raise
        self._tasks = [asyncio.create_task(self._supervise(core)), asyncio.create_task(self._tick())]

    async def close(self) -> None:
        """End the core; requests in flight get `EngineUnavailable`."""
        self._draining = True
        self.give_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drain(self) -> None:
        """Refuse new requests from now on; those in flight continue."""
        self._draining = True

    def give_up(self) -> None:
        """End all requests in flight with `EngineUnavailable`."""
        for request_id, call in list(self._calls.items()):
            call.error = _shutting_down()
            call.event.set()
            self._abort(request_id)

    async def generate(self, jobs: Sequence[Job]) -> AsyncGenerator[list[RequestOutput], None]:
        """Complete prompts together. Yields the outputs that changed, until all have finished.

        The first yield has all outputs, before any token. A request that cannot be served raises `RequestError` before
        it. An empty list is yielded if nothing has changed for some seconds. Closing the generator aborts its
        unfinished requests.

        Raises `RequestError` or `EngineUnavailable`.
        """
        self.check_room(sum(job.params.n for job in jobs))
        call = Call(time.monotonic(), time.monotonic())
        timer = asyncio.get_running_loop().call_later(self._timeout, self._expire, call)
        outputs: list[RequestOutput] = []
        try:
            for job in jobs:
                outputs.append(self._add(job, call, parent_id=outputs[0].request_id if outputs else ""))
            self._flush()
            yield outputs
            while call.open or call.changed or call.error:
                await call.event.wait()
                call.event.clear()
                if call.error:
                    raise call.error
                changed, call.changed = call.changed, {}
                yield list(changed.values())
                for output in changed.values():
                    _raise_if_failed(output)
        finally:
            timer.cancel()
            for request_id in list(call.open):
                self._abort(request_id)
            self._flush()

    async def state(self) -> CoreState | None:
        """The core's state; its last known one if a step takes long; None while there is no core."""
        if not self._core or not self._ready.is_set():
            return None
        answer: asyncio.Future[CoreState] = asyncio.get_running_loop().create_future()
        if not self._states:  # one message for all callers that wait at the same time
            self._core.send(AskState())
        self._states.append(answer)
        done, _ = await asyncio.wait({answer}, timeout=_STATE_SECONDS)
        return answer.result() if done and not answer.cancelled() else self._last_state

    def _expire(self, call: Call) -> None:
        call.error = RequestTimeout(
            "request_timeout", self._timeout, "seconds have passed since the request came",
            "ask for fewer tokens, or raise --request-timeout",
        )  # fmt: skip
        call.event.set()

    def check_room(self, wanted: int = 1, ahead: int = 0) -> None:
        """Raise `QueueFull` unless there is room for `wanted` more completions; `EngineUnavailable` during a shutdown.

        Endpoints call this before they tokenise a prompt too, so that no work goes into a request that would be
        refused. `ahead` is the number of requests that are being tokenised.
        """
        if self._draining:
            raise _shutting_down()
        held = ahead + sum(len(self.output_processor.core_ids(request_id)) for request_id in self._calls)
        if wanted > self._capacity:
            problem = f"completions in one request exceed the {self._capacity} this server holds"
            raise RequestError("n", wanted, problem, "ask for fewer")
        if held + wanted > self._capacity:
            raise QueueFull(
                "requests", held, f"completions are running or waiting, of at most {self._capacity}",
                "try again in a moment, or raise --max-queued-requests",
            )  # fmt: skip

    def _add(self, job: Job, call: Call, parent_id: str) -> RequestOutput:
        request_id = f"r{next(self._ids)}"
        output = self.output_processor.add(
            request_id, job.prompt_token_ids, job.params, job.prompt, job.prefill_at, parent_id
        )
        self.metrics.arrived(job.params)
        if output.finished:
            self.metrics.ended(output, call.times(request_id, time.monotonic()))
        else:
            self._calls[request_id] = call
            call.open.add(request_id)
        return output

    def _abort(self, request_id: str) -> None:
        core_ids = self.output_processor.core_ids(request_id)
        output = self.output_processor.abort(request_id)
        if output is not None:
            self._closed(output, core_ids)

    def _closed(self, output: RequestOutput, core_ids: Sequence[str]) -> None:
        call = self._calls.pop(output.request_id)
        call.open.discard(output.request_id)
        last = [self._last_token.pop(core_id) for core_id in core_ids if core_id in self._last_token]
        for core_id in core_ids:
            self._strikes.pop(core_id, None)
        times = call.times(output.request_id, time.monotonic(), max(last, default=None))
        self.metrics.ended(output, times, core_ids)

    def _flush(self) -> None:
        """Send the output processor's calls to the core.

        Without a core they are dropped, because `_welcome` sends all unfinished requests to the next one.
        """
        calls, self.output_processor.core_calls = self.output_processor.core_calls, CoreCalls()
        if self._core is None:
            return
        if calls.start:
            self._core.send(Start.of(calls.start))
        if calls.finish:
            self._core.send(Finish(calls.finish))

    async def _welcome(self, core: CoreProcess) -> None:
        """Wait until a core is ready and send it all unfinished requests."""
        message = await core.receive()
        if not isinstance(message, CoreReady):
            raise EngineError(f"the core began with {type(message).__name__} instead of Ready")
        core.worker_ids = message.worker_ids
        self.peer = message.peer
        self.setup = self.output_processor.setup = self.setup.with_memory(message.memory)
        self.metrics.resize(self.setup.pages_per_shard)
        self._core = core
        self.output_processor.core_calls = CoreCalls()
        requests = self.output_processor.resume()
        if requests:
            core.send(Start.of(requests))
        self._ready.set()

    async def _supervise(self, core: CoreProcess) -> None:
        """Keep a core running until cancelled."""
        pause = 0.0
        try:
            while True:
                try:
                    if self._core is not core:
                        await self._welcome(core)
                    await self._listen(core)
                except Exception as error:  # of any type: requests wait for a new core
                    # a core that was ready is replaced at once; one that does not start, after growing pauses
                    pause = 0.0 if self._ready.is_set() else min(2 * pause + 0.1, _LONGEST_PAUSE)
                    _LOG.warning("the engine has failed and starts again: %s: %s", type(error).__name__, error)
                    self._reset_after_failure(error)
                    core.kill()
                    await asyncio.sleep(pause)
                    core = await self._new_core(core.config_after(error))
        finally:
            self._core = None
            await core.close()

    async def _new_core(self, config: EngineConfig) -> CoreProcess:
        """Start a core; tries again while the operating system refuses (no memory, no process ids)."""
        while True:
            try:
                return CoreProcess(config)
            except OSError as error:
                _LOG.warning("the engine cannot be started: %s", error)
                self._reset_after_failure(error)
                await asyncio.sleep(_LONGEST_PAUSE)

    async def _listen(self, core: CoreProcess) -> NoReturn:
        while True:
            message = await core.receive()
            match message:
                case NewTokens(outputs, load, computed):
                    self.metrics.load = load
                    self.metrics.step(computed)
                    self._deliver(outputs)
                case CoreState():
                    self._last_state = message
                    for answer in self._states:
                        if not answer.done():
                            answer.set_result(message)
                    self._states.clear()
                case _:
                    raise EngineError(f"the core sent {type(message).__name__} out of turn")

    def _reset_after_failure(self, error: Exception) -> None:
        """Reset the state that belongs to a failed core, and fail requests that have seen too many failures."""
        self._core = self._last_state = None
        self._last_error = error
        self._ready.clear()
        self.restarts += 1
        self.metrics.restarted()
        for answer in self._states:
            answer.cancel()
        self._states.clear()
        for request in self.output_processor.resume():
            self._strikes[request.request_id] = self._strikes.get(request.request_id, 0) + 1
            output = self.output_processor.request_of(request.request_id)
            if output and self._strikes[request.request_id] >= _MAX_STRIKES:
                call = self._calls[output.request_id]
                call.error = EngineUnavailable(
                    f"the engine failed {_MAX_STRIKES} times while it worked on this request, at last with: {error}; "
                    "try again later, and see the server's log"
                )
                call.event.set()
                self._abort(output.request_id)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        now = time.monotonic()
        core_ids_of = {}  # kept here, because the output processor forgets them when a request ends
        for tokens in outputs:
            output = self.output_processor.request_of(tokens.request_id)
            if output is None:
                continue
            core_ids_of[output.request_id] = self.output_processor.core_ids(output.request_id)
            self._time(tokens, output, now)
        for output in self.output_processor.take(outputs):
            call = self._calls[output.request_id]
            call.changed[output.request_id] = output
            call.heard = now
            call.event.set()
            if output.finished:
                self._closed(output, core_ids_of[output.request_id])
        self._flush()

    def _time(self, tokens: TokenOutput, output: RequestOutput, now: float) -> None:
        self._strikes.pop(tokens.request_id, None)
        call = self._calls[output.request_id]
        if tokens.scheduled_at is not None:
            call.scheduled.setdefault(output.request_id, tokens.scheduled_at)
        if not tokens.tokens:  # only log probabilities of the prompt
            return
        before = self._last_token.get(tokens.request_id)
        self._last_token[tokens.request_id] = now
        if before is None and not any(completion.token_ids for completion in output.outputs):
            call.first[output.request_id] = now
            output.num_cached_tokens = tokens.num_cached_tokens
            self.metrics.first_token(output, now - call.arrived)
        self.metrics.tokens(len(tokens.tokens), None if before is None else now - before)

    async def _tick(self) -> None:
        """Once a second, extend the live page's history and the log, and wake calls that have not yielded for long."""
        while True:
            await asyncio.sleep(1.0)
            self.metrics.tick()
            if self._throughput is not None:
                self._throughput.tick()
            now = time.monotonic()
            for call in set(self._calls.values()):
                if now - call.heard >= _KEEP_ALIVE_SECONDS:
                    call.heard = now
                    call.event.set()


def _shutting_down() -> EngineUnavailable:
    return EngineUnavailable("the server is shutting down; send the request again later")


def _raise_if_failed(output: RequestOutput) -> None:
    for completion in output.outputs:
        if completion.finish_reason is FinishReason.ERROR:
            raise RequestError("request", output.request_id, str(completion.stop_reason), "change the request")
