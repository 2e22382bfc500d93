"""The instances behind a router: which of them are alive, and whether they fit together.

It owns their addresses and polls them at start and once a second; it must not forward requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from longspan.config.addresses import reachable
from longspan.disaggregation.driver import InstanceInfo
from longspan.disaggregation.handshake import difference
from longspan.disaggregation.signature import token_digest
from longspan.errors import ConfigError

_ASK_SECONDS = 2.0
_PAUSE_SECONDS = 1.0
_LOG = logging.getLogger("longspan.disaggregation")


class Answer(msgspec.Struct, frozen=True):
    """An instance's answer to `/internal/peer`."""

    # its instance info; None if it is not ready or has no role
    info: InstanceInfo | None
    # name of the served model
    model: str
    # completions that wait
    waiting: int
    # completions that run
    running: int


@dataclass
class Instance:
    """One server behind the router."""

    # `prefill` or `decode`
    role: str
    # its HTTP address
    url: str
    # its latest answer; None while it is not alive
    answer: Answer | None = None
    # for a decode instance: why it does not accept some prefill instance, as last logged
    refusal: str | None = None

    @property
    def address(self) -> str:
        """The address at which other instances reach it; empty while it is not alive."""
        if self.answer is None or self.answer.info is None:
            return ""
        host = self.url.split("://", 1)[1].split("/")[0].rpartition(":")[0]
        return reachable(self.answer.info.address, f"tcp://{host}:0")


class Instances:
    """All instances of a router.

    The sessions that are passed to its methods must send the instances' API key. `token` is the transfer token, with
    which the router may name prefill instances that a decode instance does not know. Raises `ConfigError` for a URL
    that is not HTTP.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], token: str = "") -> None:
        self.token = token
        self.all = [Instance("prefill", url.rstrip("/")) for url in prefill]
        self.all += [Instance("decode", url.rstrip("/")) for url in decode]
        for instance in self.all:
            if not instance.url.startswith(("http://", "https://")):
                raise ConfigError(instance.role, instance.url, "is no URL", "give one like http://127.0.0.1:8000")

    def alive(self, role: str) -> list[Instance]:
        """The instances of a role that answered last time."""
        return [instance for instance in self.all if instance.role == role and instance.answer]

    async def wait(self, session: aiohttp.ClientSession, seconds: float) -> None:
        """Wait until all instances have answered. Raises `ConfigError` for one that does not, or that does not fit."""
        deadline = time.monotonic() + seconds
        while missing := [instance for instance in self.all if not instance.answer]:
            problems = await asyncio.gather(*(self._ask(instance, session) for instance in missing))
            if time.monotonic() > deadline and any(problems):
                instance, problem = next((i, p) for i, p in zip(missing, problems, strict=True) if p)
                raise ConfigError(
                    instance.role, instance.url, f"{problem} (waited {seconds:g} s)",
                    f"start it with `longspan serve MODEL --role {instance.role}`, or correct the URL",
                )  # fmt: skip
            if any(problems):
                await asyncio.sleep(min(_PAUSE_SECONDS, seconds))
        for instance in self.all:
            misfit = self.misfit(instance)
            if misfit:
                raise ConfigError(instance.role, instance.url, misfit, "every instance must serve the same model")
        for instance in self.alive("decode"):
            if refusal := self._refusal(instance):
                raise ConfigError(
                    instance.role, instance.url, refusal,
                    "give the router and all instances the same --transfer-token-file, or the decode instance "
                    f"--prefill-peers {','.join(prefill.address for prefill in self.alive('prefill'))}",
                )  # fmt: skip

    async def watch(self, session: aiohttp.ClientSession) -> None:
        """Poll all instances once a second, until cancelled."""
        while True:
            await asyncio.sleep(_PAUSE_SECONDS)
            await asyncio.gather(*(self._look_after(instance, session) for instance in self.all))

    def accepts(self, decode: Instance, prefill: Instance) -> bool:
        """Whether a decode instance accepts this prefill instance from the router, and has the same token as it."""
        info, other = (side.answer.info if side.answer else None for side in (decode, prefill))
        if info is None or other is None or info.token != other.token:
            return False
        return prefill.address in info.prefill_peers or (info.token != "" and info.token == token_digest(self.token))

    def lost(self, instance: Instance, problem: str) -> None:
        """Mark an instance as not alive, until it answers a poll again."""
        if instance.answer is not None:
            _LOG.warning("%s instance %s: %s", instance.role, instance.url, problem)
        instance.answer = None

    def misfit(self, instance: Instance) -> str | None:
        """Why an instance cannot work with the first one that is alive; None if it can, or has not answered."""
        answer, first = instance.answer, next((other.answer for other in self.all if other.answer), None)
        if answer is None or answer.info is None or first is None or first.info is None:
            return None
        if answer.info.role != instance.role:
            return f"is a {answer.info.role} instance"
        if answer.model != first.model:
            return f"serves {answer.model!r}, another one {first.model!r}"
        ours, theirs = (answer, first) if instance.role == "decode" else (first, answer)
        if ours.info is None or theirs.info is None:
            return None
        return difference(ours.info.format, theirs.info.format)

    async def _look_after(self, instance: Instance, session: aiohttp.ClientSession) -> None:
        problem = await self._ask(instance, session) or self.misfit(instance)
        if problem:
            self.lost(instance, problem)
        elif instance.role == "decode":
            refusal, instance.refusal = instance.refusal, self._refusal(instance)
            if instance.refusal not in (None, refusal):
                _LOG.warning("decode instance %s %s, and computes prompts itself", instance.url, instance.refusal)

    def _refusal(self, decode: Instance) -> str | None:
        """Why a decode instance would not accept some prefill instance that is alive; None if it accepts all."""
        refused = [prefill for prefill in self.alive("prefill") if not self.accepts(decode, prefill)]
        info = decode.answer.info if decode.answer else None
        if not refused or info is None:
            return None
        if self.token and info.token and info.token != token_digest(self.token):
            return "has another transfer token than the router"
        other = refused[0].answer.info if refused[0].answer else None
        if other is not None and other.token != info.token:
            return f"has another transfer token than the prefill instance {refused[0].address}, or only one has any"
        return f"does not know the prefill instance {refused[0].address}"

    async def _ask(self, instance: Instance, session: aiohttp.ClientSession) -> str | None:
        """Poll an instance and keep its answer. Returns the problem if there is none."""
        timeout = aiohttp.ClientTimeout(_ASK_SECONDS)
        try:
            async with session.get(f"{instance.url}/internal/peer", timeout=timeout) as response:
                body = await response.read()
            if response.status == 401:
                return "refuses the router's first key; start both with the same --api-key-file"
            if response.status != 200:
                return f"answers with status {response.status}"
            answer = msgspec.json.decode(body, type=Answer)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return f"nobody answers there ({type(error).__name__})"
        except msgspec.MsgspecError:
            return "is no server of this kind"
        if answer.info is None:
            return "is not ready, or was started without --role"
        instance.answer = answer
        return None
