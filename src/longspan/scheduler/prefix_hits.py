"""What requests take from the prefix cache, and what they enter into it.

It owns which pages of a request may be shared; it must not know the order of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from longspan.cache.manager import CacheManager
from longspan.cache.pages import PageRef
from longspan.cache.prefix import Key
from longspan.scheduler.sequence import SequenceState


class PrefixHits:
    """The prefix hits of one engine's requests. With `on_one_shard` a request's pages are all on one."""

    def __init__(self, cache: CacheManager, root_key: Key, on_one_shard: bool) -> None:
        self._cache = cache
        self._root_key = root_key
        self._on_one_shard = on_one_shard

    def take(self, sequence: SequenceState) -> None:
        """Hold the pages of the longest cached prefix. The last token is never among them: it gives the logits."""
        pages = self._cache.match(self.reusable(sequence, 0))
        if self._on_one_shard:
            pages = self._first_shard(pages, sequence)
        sequence.table.extend(pages)
        sequence.computed = len(pages) * self._cache.page_size
        sequence.published = len(pages)

    def give_back(self, sequence: SequenceState) -> None:
        """Release a prefix hit: the request is not admitted in this step."""
        self._cache.release(sequence.table.pages)
        sequence.restart(self._cache.new_table)

    def reusable(self, sequence: SequenceState, first: int) -> Sequence[Key]:
        """Keys of the full pages from number `first` on that need not be computed if the cache has them."""
        scores = sequence.params.prompt_logprobs is not None  # every prompt token must be computed
        whole = 0 if scores else (len(sequence.tokens) - 1) // self._cache.page_size
        return sequence.page_keys(first, whole, self._root_key)

    def publish(self, sequence: SequenceState, stop: int) -> None:
        """Enter the pages before position `stop`, which is computed, into the prefix cache, as far as they are full."""
        if (whole := min(stop // self._cache.page_size, len(sequence.table.pages))) > sequence.published:
            keys = sequence.page_keys(sequence.published, whole, self._root_key)
            for key, page in zip(keys, sequence.table.pages[sequence.published : whole], strict=True):
                self._cache.publish(key, page)
            sequence.published = whole

    def _first_shard(self, pages: list[PageRef], sequence: SequenceState) -> list[PageRef]:
        """The first pages of a prefix hit that are on one shard, or none if the request cannot grow to its end there.

        The other pages are released.
        """
        kept: list[PageRef] = []
        if pages and self._cache.pools[pages[0].shard].num_pages >= sequence.max_pages:
            kept = list(takewhile(lambda page: page.shard == pages[0].shard, pages))
        self._cache.release(pages[len(kept) :])
        return kept
