"""What one step does, decided once (idea 6): frozen, rank-invariant, and small.

It owns the records that travel from the scheduler to every rank; it must not know how a rank
carries them out. Its size is O(new tokens): pages and tokens a rank has seen are not sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from longspan.cache.offload import PageLoad, PageSave
from longspan.cache.pages import PageRef
from longspan.plan.source import Source
from longspan.request import SamplingParams


@dataclass(frozen=True)
class Admission:
    """A request that enters, or re-enters after preemption."""

    request_id: str
    num_prompt: int
    seed: int
    params: SamplingParams
    # those that a prefix hit gave it
    pages: tuple[PageRef, ...]
    # all its tokens so far if its sampling parameters need them, else nothing
    history: tuple[int, ...]
    # whether another instance may ask for its pages
    for_peer: bool = False


@dataclass(frozen=True)
class NewPages:
    """Pages appended to a request's page table before the step."""

    request_id: str
    pages: tuple[PageRef, ...]


@dataclass(frozen=True)
class Fetch:
    """Positions [start, stop) of a request are filled by what another instance has computed, each rank its own part.

    Nothing else touches them until all ranks have said that they have theirs of fetch `number`.
    """

    number: int
    request_id: str
    start: int
    stop: int
    source: Source


@dataclass(frozen=True)
class Segment:
    """A run of new tokens of one request, computed by the TP group of one pcp index.

    Some rank of the group lacks a page the segment attends to in the first `num_remote_groups` of the model's layer
    groups, which are in order of their windows, widest first: what a narrow window needs from elsewhere, a wider one
    needs too.
    """

    request_id: str
    # position of its first token
    start: int
    # those that the scheduler knows: all, unless the last one is pending
    token_ids: tuple[int, ...]
    pcp: int
    # its phase: prefill or decode
    prefill: bool
    num_remote_groups: int
    # how many of its last rows give a token: none, one, or more to verify drafts
    sample: int
    # whether rows give the log-probabilities of the prompt tokens after them
    scores: bool = False
    # whether a token follows `token_ids` that the step before samples on the same ranks, and nobody else knows yet
    pending: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.token_ids) + self.pending

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    @property
    def unmasked_until(self) -> int:
        """Positions below this are attended without a mask: all earlier ones, and a lone token's own."""
        return unmasked_until(self.start, self.stop)


def window_start(position: int, window: int | None) -> int:
    """The first position that `position` sees: all, or `window` positions with its own."""
    return 0 if window is None else max(0, position + 1 - window)


def unmasked_until(start: int, stop: int) -> int:
    """Where a segment's unmasked attention ends.

    KV is written before attention, so a segment of one token finds itself among the pages: its diagonal
    is empty. A longer one needs the causal diagonal, and what is unmasked ends at its start.
    """
    return stop if stop - start == 1 else start


@dataclass(frozen=True)
class StepPlan:
    """One step of the engine, the same on every rank. Applied in the order of its fields.

    Copies between the device and other tiers come first. Without segments there is nothing to compute. Schedules are
    one for each layer group.
    """

    step: int
    saves: tuple[PageSave, ...]
    loads: tuple[PageLoad, ...]
    finished: tuple[str, ...]
    admitted: tuple[Admission, ...]
    new_pages: tuple[NewPages, ...]
    segments: tuple[Segment, ...]
    decode_schedules: tuple[str, ...]
    prefill_schedules: tuple[str, ...]
    fetches: tuple[Fetch, ...] = ()

    def encode(self) -> bytes:
        """The plan as msgpack bytes."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> StepPlan:
        """The inverse of `encode`."""
        return msgspec.msgpack.decode(data, type=StepPlan)

    def digest(self) -> bytes:
        """A fingerprint: ranks with equal digests take the same branches."""
        return blake2b(self.encode(), digest_size=8).digest()
