"""What every rank knows of the scheduler's requests, from plans alone: page tables, and tokens where they are needed.

It owns the order in which a plan changes them; plain Python, it must not know what a rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.cache.pages import PageTable
from longspan.plan.plan import Admission, Segment, StepPlan
from longspan.request import SamplingParams


@dataclass
class KnownRequest:
    """A request that has been admitted and has not ended."""

    # the scheduler's, page for page
    table: PageTable
    # tokens of its prompt; its output begins behind them
    num_prompt: int
    # its resolved seed
    seed: int
    # how its tokens are chosen
    params: SamplingParams
    # its tokens so far, drafts included, if its sampling parameters need them; else nothing
    history: list[int]

    def output(self, count: int) -> list[int]:
        """The first `count` tokens it has generated, if they are remembered."""
        return self.history[self.num_prompt : self.num_prompt + count]

    def remember(self, segment: Segment) -> None:
        """Take a segment's tokens, in place of drafts that proved wrong."""
        if self.history and (segment.stop > len(self.history) or not segment.prefill):
            self.history[segment.start :] = segment.token_ids


class Mirror:
    """The requests of an engine as one rank knows them, after the plans it was given, in order."""

    def __init__(self, page_size: int, num_shards: int) -> None:
        self._page_size = page_size
        self._num_shards = num_shards
        self.requests: dict[str, KnownRequest] = {}

    def apply(self, plan: StepPlan) -> None:
        """Take in a plan; a request that is preempted and admitted again ends first."""
        for request_id in plan.finished:
            del self.requests[request_id]
        for admission in plan.admitted:
            self.requests[admission.request_id] = self._known(admission)
        for new in plan.new_pages:
            self.requests[new.request_id].table.extend(new.pages)
        for segment in plan.segments:
            self.requests[segment.request_id].remember(segment)

    def table(self, request_id: str) -> PageTable:
        """The page table of a request."""
        return self.requests[request_id].table

    def _known(self, admission: Admission) -> KnownRequest:
        table = PageTable(self._page_size, self._num_shards)
        table.extend(admission.pages)
        return KnownRequest(table, admission.num_prompt, admission.seed, admission.params, list(admission.history))
