"""The prefill instance's role: computes prompts for decode instances and keeps their pages until they are fetched.

It owns whose prompt is whose; computing is the core's, sending pages the ranks'.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from longspan.config import TransferConfig
from longspan.disaggregation import messages
from longspan.disaggregation.driver import CoreHandle, Role
from longspan.disaggregation.handshake import difference
from longspan.disaggregation.messages import Format
from longspan.plan.plan import StepPlan
from longspan.plan.source import Part, Source
from longspan.request import CoreRequest, SamplingParams, TokenOutput

_KEEP_ALIVE_SECONDS = 1.0
PREFILL_ONLY = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
CheckPrompt = Callable[[list[int]], str | None]


@dataclass
class _Prompt:
    """A decode instance's prompt: `number` there; `computed` when, in `time.monotonic()`."""

    peer: bytes
    number: int
    computed: float | None = None


class PrefillRole(Role):
    """The prefill side: computes prompts for decode instances, and the requests of its own clients as any engine does.

    `check` returns what is wrong with a prompt, or None.
    """

    def __init__(self, config: TransferConfig, form: Format, parts: tuple[Part, ...], check: CheckPrompt) -> None:
        super().__init__(config, form)
        self._source = Source(self.config.epoch, (), parts)
        self._check = check
        self._welcome: set[bytes] = set()
        self._prompts: dict[str, _Prompt] = {}
        self._request_of: dict[tuple[bytes, int], str] = {}
        self._pulsed = time.monotonic()

    def start(self, core: CoreHandle, ranks: int) -> None:
        """See `Role.start`."""
        self._core = core
        self._source = replace(self._source, addresses=self._control.addresses(ranks))

    def finish(self, request_id: str) -> None:
        """See `Role.finish`."""

    def submitted(self, plan: StepPlan) -> None:
        """See `Role.submitted`: a prefill instance fetches nothing."""

    def keeps(self, output: TokenOutput) -> bool:
        """See `Role.keeps`."""
        prompt = self._prompts.get(output.request_id)
        if prompt is None:
            return False
        if output.error is not None:
            self._end(output.request_id, output.error)
        else:
            prompt.computed = time.monotonic()
            self._control.send(prompt.peer, messages.Computed(prompt.number))
        return True

    def exchange(self) -> None:
        """See `Role.exchange`."""
        for _ in self._control.from_ranks():  # they have nothing to say but that they cannot go on, which raises
            pass
        for peer, message in self._control.from_peers():
            match message:
                case messages.Hello(form):
                    self._greet(peer, form)
                case messages.Prefill(number, token_ids):
                    self._take(peer, number, token_ids)
                case messages.Release(number):
                    request = self._request_of.get((peer, number))
                    if request is not None:
                        self.counters.sent += self._prompts[request].computed is not None
                        self._drop(request)
        now = time.monotonic()
        if now - self._pulsed >= _KEEP_ALIVE_SECONDS:
            self._pulsed = now
            self._look_after(now)

    def _greet(self, peer: bytes, form: Format) -> None:
        reason = difference(form, self.card.format)
        if reason is None:
            self._welcome.add(peer)
            self._control.send(peer, messages.Welcome(self._source))
        else:
            self._control.send(peer, messages.Refused(reason))

    def _take(self, peer: bytes, number: int, token_ids: list[int]) -> None:
        if (peer, number) in self._request_of:
            reason: str | None = "this number is in use"
        elif peer not in self._welcome:
            reason = "this instance was not greeted, or refused"
        else:
            reason = self._check(token_ids)
        if reason is not None or self._core is None:
            self._control.send(peer, messages.Ended(number, reason or "not ready yet"))
            return
        request = f"peer-{secrets.token_hex(16)}"  # who knows it may read the pages: nobody can guess it
        self._prompts[request] = _Prompt(peer, number)
        self._request_of[peer, number] = request
        self._core.add(CoreRequest(request, token_ids, PREFILL_ONLY, 0, 1, for_peer=True))
        self._control.send(peer, messages.Accepted(number, request))

    def _look_after(self, now: float) -> None:
        """Drop prompts of instances that are gone, and pages that nobody fetches."""
        gone = {peer for peer in self._welcome if not self._control.send(peer, messages.Pulse())}
        self._welcome -= gone
        for request, prompt in list(self._prompts.items()):
            if prompt.peer in gone:
                self._drop(request)
            elif prompt.computed is not None and now - prompt.computed > self.config.hold_seconds:
                self._end(request, f"its pages were not fetched for {self.config.hold_seconds:g} s")

    def _end(self, request: str, reason: str) -> None:
        prompt = self._prompts[request]
        self._control.send(prompt.peer, messages.Ended(prompt.number, reason))
        self._drop(request)

    def _drop(self, request: str) -> None:
        prompt = self._prompts.pop(request)
        del self._request_of[prompt.peer, prompt.number]
        if self._core is not None:
            self._core.finish(request)
