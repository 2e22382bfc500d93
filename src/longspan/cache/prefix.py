"""Prefix cache: finished pages found again by their content, whoever computed them.

It owns the chain of content hashes and the order of eviction; it must not know where pages are
placed or which rank asks: keys cover parent, tokens and model, never a rank's view.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from longspan.cache.pages import PageRef

Key = bytes


def root_key(*facts: object) -> Key:
    """The parent of every first page: a hash of what makes KV comparable (model, dtype, page size, adapter)."""
    return blake2b(repr(facts).encode(), digest_size=16).digest()


def page_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """The key of one whole page: its tokens and, through `parent`, all tokens before it."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Which key is on which page, and which of those pages nobody holds, oldest first, for each shard."""

    def __init__(self, num_shards: int) -> None:
        self._page_of: dict[Key, PageRef] = {}
        self._key_of: dict[PageRef, Key] = {}
        self._idle: list[OrderedDict[PageRef, None]] = [OrderedDict() for _ in range(num_shards)]

    def lookup(self, keys: Sequence[Key]) -> Iterator[PageRef]:
        """The pages of the longest run of known keys from the start."""
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                return
            yield page

    def register(self, key: Key, page: PageRef) -> None:
        """Publish a whole, computed page. A key that is known keeps its first page."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def holds(self, page: PageRef) -> bool:
        """Whether the page's content can be found again."""
        return page in self._key_of

    def idle(self, shard: int) -> int:
        """How many published pages of `shard` nobody holds: they can be evicted."""
        return len(self._idle[shard])

    def set_idle(self, page: PageRef) -> None:
        """The last holder let go: the page becomes the newest candidate for eviction."""
        self._idle[page.shard][page] = None

    def set_busy(self, page: PageRef) -> None:
        """Somebody holds the page again: it cannot be evicted."""
        self._idle[page.shard].pop(page, None)

    def evict(self, shard: int) -> PageRef:
        """Forget the page of `shard` that has been idle longest and return it."""
        page, _ = self._idle[shard].popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def idle_pages(self) -> set[PageRef]:
        """Every idle page: for integrity checks."""
        return {page for shard in self._idle for page in shard}
