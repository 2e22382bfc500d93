"""The prefix cache: full pages are found again by a hash of their content.

It owns the chain of hashes and the order of eviction. A key depends on the model, the page's tokens and all tokens
before them, and on no rank or shard, so a request finds a page on whichever shard it is.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from longspan.cache.pages import PageRef

Key = bytes
"""A 16-byte hash of a page's tokens and of everything before them."""


def root_key(*facts: object) -> Key:
    """The parent key of a first page: a hash of what the KV depends on besides tokens (model, dtype, page size)."""
    return blake2b(repr(facts).encode(), digest_size=16).digest()


def page_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """The key of a full page, from its tokens and the key of the page before it."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """The keys of published pages, and which of these pages are idle: held by nobody, so that they can be evicted."""

    def __init__(self, num_shards: int) -> None:
        self._page_of: dict[Key, PageRef] = {}
        self._key_of: dict[PageRef, Key] = {}
        # for each shard, its idle pages in the order of eviction
        self._idle: list[OrderedDict[PageRef, None]] = [OrderedDict() for _ in range(num_shards)]

    def lookup(self, keys: Sequence[Key]) -> Iterator[PageRef]:
        """The pages of the longest prefix of `keys` that is known."""
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                return
            yield page

    def register(self, key: Key, page: PageRef) -> None:
        """Publish a full, computed page. Does nothing if the key or the page is published already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def holds(self, page: PageRef) -> bool:
        """Whether the page is published."""
        return page in self._key_of

    def idle(self, shard: int) -> int:
        """Number of idle pages of `shard`."""
        return len(self._idle[shard])

    def set_idle(self, page: PageRef) -> None:
        """Mark a published page as idle. It is evicted after all pages that are idle now."""
        self._idle[page.shard][page] = None

    def set_busy(self, page: PageRef) -> None:
        """Mark a page as held: it cannot be evicted."""
        self._idle[page.shard].pop(page, None)

    def evict(self, shard: int) -> PageRef:
        """Remove and return the page of `shard` that has been idle longest. Raises `KeyError` if none is idle."""
        page, _ = self._idle[shard].popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def idle_pages(self) -> set[PageRef]:
        """All idle pages, for integrity checks."""
        return {page for shard in self._idle for page in shard}
