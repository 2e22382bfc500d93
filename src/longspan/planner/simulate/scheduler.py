"""The engine's scheduler, fed with requests whose tokens nobody knows, and able to repeat a step many times at once.

It owns the two things a simulation adds: page keys given from outside, and steps that are skipped because they would
do what the last one did. Every decision remains the scheduler's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longspan.cache.pages import PageTable
from longspan.cache.prefix import Key
from longspan.request import CoreRequest, SamplingParams
from longspan.scheduler.scheduler import Scheduler
from longspan.scheduler.sequence import SequenceState


class SimulatedScheduler(Scheduler):
    """See `Scheduler`."""

    def add_keyed(self, number: int, prompt_tokens: int, max_tokens: int, keys: Iterable[Key]) -> None:
        """Queue a request that `Limits.check` has passed, whose prompt's page keys are given: its tokens are made up.

        All its tokens are its own number, so that pages with output tokens are like no other request's.
        """
        request = CoreRequest(str(number), [number] * prompt_tokens, SamplingParams(temperature=0), 0, max_tokens)
        self.queue(SequenceState(request, self.cache.new_table(), keys=keys))

    def cached_pages(self, keys: Sequence[Key]) -> int:
        """How many leading pages of a prompt its cache has now."""
        return sum(1 for _ in self.cache.prefix.lookup(keys)) if self.cache.enable_prefix_caching else 0

    def table(self, request_id: str) -> PageTable:
        """The page table of a request that has not ended."""
        return self._sequences[request_id].table

    @property
    def steps_alike(self) -> int:
        """How many next steps only give every running request its next token, whoever asks: 0 if not the next one.

        In such a step nothing is admitted, placed, published, preempted or drafted, so that it changes two counters of
        each request and nothing else. The caller must know that nobody arrives and nobody ends in them.
        """
        if (self.waiting and len(self.running) < self.config.running_limit) or self.config.prompt_lookup:
            return 0
        if any(s.remaining != 1 or s.in_flight for s in self.running):
            return 0
        fullest = min((s.table.page_size * len(s.table.pages) - s.computed for s in self.running), default=0)
        return max(0, fullest - 1)  # the step that fills a page publishes it, and the one behind it takes another

    def skip(self, steps: int) -> None:
        """Do what `steps` times `schedule` and `commit` would do; at most `steps_alike`."""
        for sequence in self.running:
            sequence.computed += steps
            sequence.tokens += sequence.tokens[:1] * steps
        self._step += steps
