"""Asks a model behind an OpenAI-compatible `/v1/completions`.

It owns the requests and what of a reply is an answer; a failure is never one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any

import aiohttp
import msgspec

from longspan.config import require
from longspan.errors import ConfigError
from longspan.evaluate.asking import Answer, Batch, OnAnswer

_CONNECT_S, _ANSWER_S = 10, 600  # an answer may have to wait for its turn in the server
_OK = 200
_SHOWN = 200  # characters of a reply in an error
_LOST = ("abort", "error")  # reasons of an end that is not the model's


class _Choice(msgspec.Struct):
    text: str
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None


@dataclass(frozen=True)
class Endpoint:
    """A served model. `base_url` may end in `/v1` or not; up to `concurrency` requests are in flight."""

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 32

    def __post_init__(self) -> None:
        web = self.base_url.startswith(("http://", "https://"))
        require(web, "base_url", self.base_url, "is not a web address", "give one as in http://localhost:8000")
        require(self.concurrency >= 1, "concurrency", self.concurrency, "must be at least 1", "give 1 or more")

    def ask(self, batch: Batch, on_answer: OnAnswer) -> list[Answer]:
        """Answers in the order of the prompts. The first failure ends it: raises `ConfigError`."""
        return asyncio.run(self._ask(batch, on_answer))

    async def _ask(self, batch: Batch, on_answer: OnAnswer) -> list[Answer]:
        answers: dict[int, Answer] = {}
        waiting = iter(enumerate(batch.prompts))

        async def work(session: aiohttp.ClientSession) -> None:
            for number, prompt in waiting:
                answers[number] = await self._complete(session, prompt, batch)
                on_answer()

        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        timeout = aiohttp.ClientTimeout(connect=_CONNECT_S, sock_read=_ANSWER_S)
        connector = aiohttp.TCPConnector(limit=0)  # the workers are the limit
        try:
            async with (
                aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(min(self.concurrency, len(batch.prompts))):
                    group.create_task(work(session))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [answers[number] for number in range(len(batch.prompts))]

    async def _complete(self, session: aiohttp.ClientSession, prompt: str, batch: Batch) -> Answer:
        url = f"{self.base_url.rstrip('/').removesuffix('/v1')}/v1/completions"
        body: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": batch.max_tokens, "temperature": 0, "stop": batch.stop,
        }  # fmt: skip
        try:
            async with session.post(url, json=body, allow_redirects=False) as reply:
                content = await reply.read()
        except (aiohttp.ClientError, ValueError) as error:  # the second: a key or an address that cannot be sent
            reason = f"gives no answer ({type(error).__name__}: {error})"
            raise self._failure(reason, "check that the server runs and the address is right") from error
        shown = repr(content.decode(errors="replace")[:_SHOWN])
        if reply.status != _OK:
            reason = f"answered HTTP {reply.status} to a prompt: {shown}"
            raise self._failure(reason, "check MODEL, --api-key and the server's log")
        try:
            completion = msgspec.json.decode(content, type=_Completion)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            reason = f"answered what is no completion ({error}): {shown}"
            raise self._failure(reason, "give the address of an OpenAI-compatible server") from error
        choice = completion.choices[0]
        if choice.finish_reason in _LOST:
            raise self._failure(f"ended a completion with {choice.finish_reason!r}", "see the server's log")
        return Answer(choice.text, completion.usage.completion_tokens if completion.usage else None)

    def _failure(self, reason: str, remedy: str) -> ConfigError:
        return ConfigError("base_url", self.base_url, f"{reason}; nothing was scored", remedy)
