"""The state of requests on a rank, rebuilt from the plans: page tables, and tokens where sampling needs them.

It owns the order in which a plan changes this state. Plain Python: it must not know what a rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.cache.pages import PageTable
from longspan.plan.plan import Admission, Segment, StepPlan
from longspan.request import SamplingParams

UNKNOWN = -1
"""In place of a token that a rank has not been told."""


@dataclass
class KnownRequest:
    """A request that has been admitted and has not ended, as a rank knows it."""

    # a copy of the scheduler's page table
    table: PageTable
    # number of prompt tokens; the output begins after them
    num_prompt: int
    # seed of its random numbers, resolved
    seed: int
    # how its tokens are sampled
    params: SamplingParams
    # its tokens so far, drafts included, if its sampling parameters need them; else empty. Those that were pending are
    # UNKNOWN
    history: list[int]

    def output(self, count: int) -> list[int]:
        """The first `count` generated tokens; empty if `history` is not kept."""
        return self.history[self.num_prompt : self.num_prompt + count]

    def remember(self, segment: Segment) -> None:
        """Write a segment's tokens into `history`, in place of rejected drafts. A chunk that it has is skipped."""
        if segment.stop > len(self.history) or not segment.prefill:
            self.history += [UNKNOWN] * (segment.start - len(self.history))
            self.history[segment.start :] = segment.token_ids


class Mirror:
    """The requests of an engine on one rank. `apply` must be given every plan, in order."""

    def __init__(self, page_size: int, num_shards: int) -> None:
        self._page_size = page_size
        self._num_shards = num_shards
        self.requests: dict[str, KnownRequest] = {}
        self._remembering: set[str] = set()  # requests whose tokens are kept

    def apply(self, plan: StepPlan) -> None:
        """Update the requests from a plan.

        Ends come before admissions: a preempted request may be admitted again in the same plan.
        """
        for request_id in plan.finished:
            del self.requests[request_id]
            self._remembering.discard(request_id)
        for admission in plan.admitted:
            self.requests[admission.request_id] = self._known(admission)
            if admission.history:
                self._remembering.add(admission.request_id)
        for new in plan.new_pages:
            self.requests[new.request_id].table.extend(new.pages)
        for segment in plan.segments if self._remembering else ():
            if segment.request_id in self._remembering:
                self.requests[segment.request_id].remember(segment)

    def table(self, request_id: str) -> PageTable:
        """The page table of a request."""
        return self.requests[request_id].table

    def _known(self, admission: Admission) -> KnownRequest:
        table = PageTable(self._page_size, self._num_shards)
        table.extend(admission.pages)
        return KnownRequest(table, admission.num_prompt, admission.seed, admission.params, list(admission.history))
