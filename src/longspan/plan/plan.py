"""The plan of one step, which the scheduler sends to every rank (idea 6 of docs/architecture.md).

A plan is immutable and the same on all ranks. This module owns its records and their encoding; it must not know how a
rank carries them out. A plan's size is O(new tokens): pages and tokens that were sent before are not sent again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

import msgspec

from longspan.cache.offload import PageLoad, PageSave
from longspan.cache.pages import PageRef
from longspan.plan.source import Source
from longspan.request import SamplingParams


@dataclass(frozen=True)
class Admission:
    """A request that starts, or starts again after a preemption."""

    # the request's id, unique among the requests that have not ended
    request_id: str
    # number of prompt tokens
    num_prompt: int
    # seed of its random numbers, resolved
    seed: int
    # how its tokens are sampled
    params: SamplingParams
    # pages of its prefix hit, in position order
    pages: tuple[PageRef, ...]
    # all its tokens so far if its sampling parameters need them, else empty
    history: tuple[int, ...]
    # whether another instance may fetch its pages
    for_peer: bool = False


@dataclass(frozen=True)
class NewPages:
    """Pages appended to a request's page table before the step."""

    # the request
    request_id: str
    # the pages, in position order
    pages: tuple[PageRef, ...]


@dataclass(frozen=True)
class Fetch:
    """The KV of positions [start, stop) of a request is fetched from another instance; each rank fetches its part.

    These positions are neither read nor written until all ranks have reported that fetch `number` is complete.
    """

    # number of the fetch, counted by the scheduler
    number: int
    # the request
    request_id: str
    # first position
    start: int
    # position after the last
    stop: int
    # the instance that has computed the KV
    source: Source


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Adjacent new tokens of one request, computed in this step by the TP group of one pcp index.

    A step has hundreds: a struct is made, sent as a list and read in a fraction of a dataclass's time.
    """

    # the request
    request_id: str
    # position of the first token
    start: int
    # the tokens that the scheduler knows: all of them, unless the last ones are pending
    token_ids: tuple[int, ...]
    # index of the TP group that computes the segment
    pcp: int
    # phase: True for prefill, False for decode
    prefill: bool
    # number of layer groups, counted from the widest window, in which some rank of the TP group lacks a page that the
    # segment attends to. One number is enough: a wider window needs every page that a narrower one needs
    num_remote_groups: int
    # number of last rows whose logits are sampled: 0, 1, or more where drafts are verified
    sample: int
    # whether the rows give log-probabilities of the prompt tokens that follow them
    scores: bool = False
    # how many tokens follow `token_ids` whose ids are not known to the scheduler yet: one that the same ranks sample in
    # the step before, and what they draft behind it
    pending: int = 0
    # how many positions later than `start` the segment may begin. Each draft of the step before that proves right moves
    # it by one; ranks find out how many do
    slack: int = 0
    # the token after the segment, where the scheduler knows it and the ranks draft with layers of the model
    next_token: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens, the pending ones included."""
        return len(self.token_ids) + self.pending

    @property
    def stop(self) -> int:
        """Position after the last token, if the segment begins at `start`."""
        return self.start + len(self.token_ids) + self.pending  # not `length`: this is read for every row of a step

    @property
    def unmasked_until(self) -> int:
        """Positions below this one are attended without a mask: see the function of the same name."""
        return unmasked_until(self.start, self.stop)


def window_start(position: int, window: int | None) -> int:
    """The first position that the token at `position` sees; `window` counts its own, None sees all."""
    return 0 if window is None else max(0, position + 1 - window)


def rows_of_pcp(segments: Iterable[Segment], count: int) -> list[int]:
    """The number of rows of each of `count` pcp indices."""
    rows = [0] * count
    for segment in segments:
        rows[segment.pcp] += segment.length
    return rows


def unmasked_until(start: int, stop: int) -> int:
    """The position before which the segment [start, stop) attends to the cache without a mask.

    For a segment of several tokens this is `start`: its own tokens need the causal mask of the diagonal. KV is written
    before attention, so a segment of one token finds its own key in the cache and needs no diagonal: this is `stop`.
    """
    return stop if stop - start == 1 else start


@dataclass(frozen=True)
class StepPlan:
    """One step of the engine, the same on every rank. Ranks apply `saves` to `new_pages` in the order of the fields."""

    # number of the step, counted from 1
    step: int
    # pages that are copied from the device to another tier before the step
    saves: tuple[PageSave, ...]
    # pages that are then copied from another tier to the device
    loads: tuple[PageLoad, ...]
    # ids of requests that have ended or were preempted since the last plan
    finished: tuple[str, ...]
    # requests that start in this step
    admitted: tuple[Admission, ...]
    # pages that requests are given for this step
    new_pages: tuple[NewPages, ...]
    # what is computed; may be empty, if the step only copies pages
    segments: tuple[Segment, ...]
    # the schedule of the decode phase in each layer group, widest window first
    decode_schedules: tuple[str, ...]
    # the schedule of the prefill phase in each layer group, widest window first
    prefill_schedules: tuple[str, ...]
    # KV that is fetched from other instances, beginning with this step
    fetches: tuple[Fetch, ...] = ()

    def encode(self) -> bytes:
        """The plan as msgpack bytes."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> StepPlan:
        """The inverse of `encode`."""
        return msgspec.msgpack.decode(data, type=StepPlan)

    def digest(self) -> bytes:
        """An 8-byte hash of the plan. In debug mode ranks compare it before they carry the plan out."""
        return blake2b(self.encode(), digest_size=8).digest()


def all_travel(plan: StepPlan, schedule: str) -> StepPlan:
    """The same step, in which every row travels under `schedule`."""
    groups = len(plan.decode_schedules)
    segments = tuple(msgspec.structs.replace(segment, num_remote_groups=groups) for segment in plan.segments)
    schedules = (schedule,) * groups
    return replace(plan, segments=segments, decode_schedules=schedules, prefill_schedules=schedules)
