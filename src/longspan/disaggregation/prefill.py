"""The role of a prefill instance: it computes prompts for decode instances and holds their pages until `Release`.

It owns which prompt belongs to which decode instance. The core computes the prompts, the ranks send the pages.
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

_PING_SECONDS = 1.0
PREFILL_ONLY = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
CheckPrompt = Callable[[list[int]], str | None]


@dataclass
class _Prompt:
    """A prompt of a decode instance."""

    # the decode instance, as the control socket names it
    peer: bytes
    # its number for the prompt
    number: int
    # when the prompt's last page was computed, by `time.monotonic()`; None before
    computed_at: float | None = None


class PrefillRole(Role):
    """The prefill side, see `Role`. The instance also serves requests of its own users, like any engine.

    `parts` is what each of its ranks stores. `check` returns why a prompt cannot be computed, or None if it can.
    """

    def __init__(
        self, config: TransferConfig, page_format: Format, parts: tuple[Part, ...], check: CheckPrompt
    ) -> None:
        super().__init__(config, page_format)
        self._source = Source(self.config.epoch, (), parts)
        self._check = check
        self._peers: set[bytes] = set()  # decode instances whose `Hello` was accepted
        self._prompts: dict[str, _Prompt] = {}  # by request id
        self._request_of: dict[tuple[bytes, int], str] = {}  # by peer and its number
        self._pinged_at = time.monotonic()

    def start(self, core: CoreHandle, ranks: int) -> None:
        """See `Role.start`."""
        self._core = core
        self._source = replace(self._source, addresses=self._control.addresses(ranks))

    def finish(self, request_id: str) -> None:
        """See `Role.finish`. Nothing to do: prompts of decode instances end in `_drop`."""

    def submitted(self, plan: StepPlan) -> None:
        """See `Role.submitted`. Nothing to do: a prefill instance fetches nothing."""

    def holds(self, output: TokenOutput) -> bool:
        """See `Role.holds`: true for prompts of decode instances."""
        prompt = self._prompts.get(output.request_id)
        if prompt is None:
            return False
        if output.error is not None:
            self._fail(output.request_id, output.error)
        else:
            prompt.computed_at = time.monotonic()
            self._control.send(prompt.peer, messages.Computed(prompt.number))
        return True

    def poll(self) -> None:
        """See `Role.poll`."""
        for _ in self._control.from_ranks():  # after the start only `TransferFailed`, which raises
            pass
        for peer, message in self._control.from_peers():
            match message:
                case messages.Hello(page_format):
                    self._answer_hello(peer, page_format)
                case messages.Prefill(number, token_ids):
                    self._add_prompt(peer, number, token_ids)
                case messages.Release(number):
                    request = self._request_of.get((peer, number))
                    if request is not None:
                        self.counters.sent += self._prompts[request].computed_at is not None
                        self._drop(request)
        now = time.monotonic()
        if now - self._pinged_at >= _PING_SECONDS:
            self._pinged_at = now
            self._drop_abandoned(now)

    def _answer_hello(self, peer: bytes, page_format: Format) -> None:
        reason = difference(page_format, self.info.format)
        if reason is None:
            self._peers.add(peer)
            self._control.send(peer, messages.Welcome(self._source))
        else:
            self._control.send(peer, messages.Refused(reason))

    def _add_prompt(self, peer: bytes, number: int, token_ids: list[int]) -> None:
        if (peer, number) in self._request_of:
            reason: str | None = "this number is in use"
        elif peer not in self._peers:
            reason = "this instance has not sent a valid Hello"
        else:
            reason = self._check(token_ids)
        if reason is not None or self._core is None:
            self._control.send(peer, messages.PrefillFailed(number, reason or "not ready yet"))
            return
        # page senders send a prompt's pages to any peer that names its id, so the id must not be guessable
        request = f"peer-{secrets.token_hex(16)}"
        self._prompts[request] = _Prompt(peer, number)
        self._request_of[peer, number] = request
        self._core.add(CoreRequest(request, token_ids, PREFILL_ONLY, 0, 1, for_peer=True))
        self._control.send(peer, messages.Accepted(number, request))

    def _drop_abandoned(self, now: float) -> None:
        """Drop prompts of decode instances that have disconnected, and prompts that were not fetched in time."""
        gone = {peer for peer in self._peers if not self._control.send(peer, messages.Ping())}
        self._peers -= gone
        for request, prompt in list(self._prompts.items()):
            if prompt.peer in gone:
                self._drop(request)
            elif prompt.computed_at is not None and now - prompt.computed_at > self.config.hold_seconds:
                self._fail(request, f"its pages were not fetched for {self.config.hold_seconds:g} s")

    def _fail(self, request: str, reason: str) -> None:
        """Drop a prompt and report the reason to its decode instance."""
        prompt = self._prompts[request]
        self._control.send(prompt.peer, messages.PrefillFailed(prompt.number, reason))
        self._drop(request)

    def _drop(self, request: str) -> None:
        """End a prompt's request, which frees its pages."""
        prompt = self._prompts.pop(request)
        del self._request_of[prompt.peer, prompt.number]
        if self._core is not None:
            self._core.finish(request)
