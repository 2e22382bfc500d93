"""Messages between the server's process and the core's process.

It owns the message types; it must not know how they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from longspan.cache.offload import OffloadCounters
from longspan.disaggregation.driver import InstanceInfo, TransferCounters
from longspan.engine.driver.core import StepRecord
from longspan.engine.memory_use import MemoryUse
from longspan.request import CoreRequest, SamplingParams, TokenOutput
from longspan.scheduler.counters import SchedulerCounters

_NO_PARAMS = SamplingParams()


class Start(msgspec.Struct, tag=True, frozen=True):
    """Start completions, or continue them in a new core. What several completions share is sent once."""

    # the distinct prompts
    prompts: list[list[int]]
    # the distinct sampling parameters, which may hold a grammar and stop strings
    params: list[SamplingParams]
    # (index in `prompts`, index in `params`, request without both)
    completions: list[tuple[int, int, CoreRequest]]

    @staticmethod
    def of(requests: Sequence[CoreRequest]) -> Start:
        """The message for these requests. Requests whose prompts or parameters are the same object share them."""
        prompts = {id(request.prompt_token_ids): request.prompt_token_ids for request in requests}
        params = {id(request.params): request.params for request in requests}
        prompt_places = {key: place for place, key in enumerate(prompts)}
        params_places = {key: place for place, key in enumerate(params)}
        completions = [
            (
                prompt_places[id(request.prompt_token_ids)], params_places[id(request.params)],
                replace(request, prompt_token_ids=(), params=_NO_PARAMS),
            )
            for request in requests
        ]  # fmt: skip
        return Start([list(prompt) for prompt in prompts.values()], list(params.values()), completions)

    @property
    def requests(self) -> list[CoreRequest]:
        """The requests with their prompts and parameters."""
        return [
            replace(request, prompt_token_ids=self.prompts[prompt], params=self.params[params])
            for prompt, params, request in self.completions
        ]


class Finish(msgspec.Struct, tag=True, frozen=True):
    """End completions."""

    # their ids in the core
    request_ids: list[str]


class AskState(msgspec.Struct, tag=True, frozen=True):
    """Ask the core to answer with a `CoreState`."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Ask the core to end."""


ToCore = Start | Finish | AskState | Stop


class CoreReady(msgspec.Struct, tag=True, frozen=True):
    """Every rank has loaded its weights."""

    # process ids of the ranks; empty if they are not processes of this machine
    worker_ids: list[int]
    # what other instances must know of this one; None without a role
    peer: InstanceInfo | None = None
    # what the ranks have measured of a GPU's memory; None if they have not
    memory: MemoryUse | None = None


class Beat(msgspec.Struct, tag=True, frozen=True):
    """The core's heartbeat."""

    late: str | None = None  # the rank that has not answered for some seconds, and how long
    pace: float | None = None  # `StepWatch.pace`


class CoreLoad(msgspec.Struct, frozen=True):
    """Counters of the core, sent with every step's tokens."""

    # pages of each shard that requests hold
    used_pages: tuple[int, ...] = ()
    # requests that wait and run, preemptions, draft tokens
    scheduler: SchedulerCounters = SchedulerCounters()
    # prompts moved between instances; None without a role
    transfer: TransferCounters | None = None
    # pages moved to and from host memory and disk; None without offload
    offload: OffloadCounters | None = None


class NewTokens(msgspec.Struct, tag=True, frozen=True):
    """The result of a step."""

    # one for each completion that got tokens or ended
    outputs: list[TokenOutput]
    # counters after the step
    load: CoreLoad
    # tokens that the step computed; 0 if there was none
    computed: int = 0


class SequenceReport(msgspec.Struct, frozen=True):
    """The progress of one completion."""

    # its id in the core
    request_id: str
    # False while it waits
    running: bool
    # tokens computed so far
    computed_tokens: int
    # its pages in order of positions, as (shard, number of adjacent pages on it)
    runs: list[tuple[int, int]]


class CoreState(msgspec.Struct, tag=True, frozen=True):
    """What the live page shows of the core."""

    # counters now
    load: CoreLoad
    # pages of each shard that only the prefix cache holds
    cached_pages: tuple[int, ...]
    # completions, running ones first; at most 64
    sequences: list[SequenceReport]
    # the last steps
    steps: list[StepRecord]
    # bytes that ranks have sent, by the label of the collective
    bytes_by_label: dict[str, int]


class CoreFailed(msgspec.Struct, tag=True, frozen=True):
    """The core has failed and ends."""

    # name of the exception's class
    kind: str
    # the exception's message
    message: str


FromCore = CoreReady | Beat | NewTokens | CoreState | CoreFailed
