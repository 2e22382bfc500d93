"""What the server's process and the core's process tell each other.

It owns the message types; it must not know how they travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from longspan.cache.offload import OffloadCounters
from longspan.disaggregation.driver import PeerCard, TransferCounters
from longspan.engine.driver.core import StepRecord
from longspan.request import CoreRequest, TokenOutput
from longspan.scheduler.scheduler import SchedulerCounters


class Start(msgspec.Struct, tag=True, frozen=True):
    """Completions to begin with, or to go on with after a restart; a prompt that several share is sent once."""

    prompts: list[list[int]]
    completions: list[tuple[int, CoreRequest]]

    @staticmethod
    def of(requests: Sequence[CoreRequest]) -> Start:
        """The message for requests, whose own prompts are left out."""
        places: dict[int, int] = {}
        prompts: list[list[int]] = []
        completions: list[tuple[int, CoreRequest]] = []
        for request in requests:
            place = places.setdefault(id(request.prompt_token_ids), len(prompts))
            if place == len(prompts):
                prompts.append(list(request.prompt_token_ids))
            completions.append((place, replace(request, prompt_token_ids=())))
        return Start(prompts, completions)

    @property
    def requests(self) -> list[CoreRequest]:
        """The requests with their prompts."""
        return [replace(request, prompt_token_ids=self.prompts[place]) for place, request in self.completions]


class Finish(msgspec.Struct, tag=True, frozen=True):
    """Completions that have ended: their pages are free within a step."""

    request_ids: list[str]


class AskState(msgspec.Struct, tag=True, frozen=True):
    """Wanted: one `CoreState`."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End yourself."""


ToCore = Start | Finish | AskState | Stop


class CoreReady(msgspec.Struct, tag=True, frozen=True):
    """Every rank has loaded its weights; `worker_ids` are the processes of the ranks, if they have any.

    `peer` is what others of a pair must know of it, if it has a role.
    """

    worker_ids: list[int]
    peer: PeerCard | None = None


class Beat(msgspec.Struct, tag=True, frozen=True):
    """The core's process runs."""

    late: str | None = None  # which of its ranks has not answered for some seconds
    pace: float | None = None  # its `StepWatch.pace`


class CoreLoad(msgspec.Struct, frozen=True):
    """What is in use and was done, sent with every step's tokens; with what offload and a role have moved."""

    used_pages: tuple[int, ...] = ()
    scheduler: SchedulerCounters = SchedulerCounters()
    transfer: TransferCounters | None = None
    offload: OffloadCounters | None = None


class NewTokens(msgspec.Struct, tag=True, frozen=True):
    """What a step gave."""

    outputs: list[TokenOutput]
    load: CoreLoad


class SequenceReport(msgspec.Struct, frozen=True):
    """One completion's progress; `runs` are its pages in position order as (shard, pages) pairs."""

    request_id: str
    running: bool
    computed_tokens: int
    runs: list[tuple[int, int]]


class CoreState(msgspec.Struct, tag=True, frozen=True):
    """Everything the live page shows of the core. `cached_pages` are those that only the prefix cache holds."""

    load: CoreLoad
    cached_pages: tuple[int, ...]
    sequences: list[SequenceReport]
    steps: list[StepRecord]
    bytes_by_label: dict[str, int]


class CoreFailed(msgspec.Struct, tag=True, frozen=True):
    """The core cannot go on; `kind` is the name of the error."""

    kind: str
    message: str


FromCore = CoreReady | Beat | NewTokens | CoreState | CoreFailed
