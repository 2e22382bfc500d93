"""The engine's scheduler for a simulation.

It adds two things to `Scheduler`: requests whose page keys are given, because their tokens are not known, and decode
steps that are advanced at once because they repeat the last one. It must not change any decision of the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longspan.cache.pages import PageTable
from longspan.cache.prefix import Key
from longspan.request import CoreRequest, SamplingParams
from longspan.scheduler.scheduler import Scheduler
from longspan.scheduler.sequence import SequenceState


class SimulatedScheduler(Scheduler):
    """A scheduler for requests without tokens, which can repeat a decode step several times at once."""

    def add_keyed(self, number: int, prompt_tokens: int, max_tokens: int, keys: Iterable[Key]) -> None:
        """Queue a request that `Limits.check` has accepted. `keys` are the page keys of its prompt.

        All its tokens are its number, so that pages with output tokens have keys that no other request has.
        """
        request = CoreRequest(str(number), [number] * prompt_tokens, SamplingParams(temperature=0), 0, max_tokens)
        self.queue(SequenceState(request, self.cache.new_table(), keys=keys))

    def cached_pages(self, keys: Sequence[Key]) -> int:
        """Number of leading pages of a prompt that are in the prefix cache."""
        return sum(1 for _ in self.cache.prefix.lookup(keys)) if self.cache.enable_prefix_caching else 0

    def table(self, request_id: str) -> PageTable:
        """The page table of a request that has not ended."""
        return self._sequences[request_id].table

    @property
    def repeatable_steps(self) -> int:
        """How many next steps compute one token of every running request and change nothing else.

        In such a step no request is admitted or preempted, and no page is placed or published: only two counters of
        each request change. The caller must make sure that no request arrives or ends in these steps.
        """
        if (self.waiting and len(self.running) < self.config.running_limit) or self.config.speculative:
            return 0
        if any(s.remaining != 1 or s.in_flight for s in self.running):
            return 0
        fullest = min((s.table.page_size * len(s.table.pages) - s.computed for s in self.running), default=0)
        return max(0, fullest - 1)  # the step that fills a page publishes it, and the next one needs a new page

    def skip(self, steps: int) -> None:
        """Advance by `steps` steps, at most `repeatable_steps`, as `schedule` and `commit` would."""
        for sequence in self.running:
            sequence.computed += steps
            sequence.tokens += sequence.tokens[:1] * steps
        self._step += steps
