"""The pages of all shards together: taking, sharing, letting go, reusing.

It owns reference counts and joins the pools with the prefix cache; it must not decide on which
shard a page goes (placement does) nor know about ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from longspan.cache.offload import OffloadIndex, PageLoad, PageSave
from longspan.cache.pages import PagePool, PageRef, PageTable
from longspan.cache.prefix import Key, PrefixCache
from longspan.errors import EngineError


class CacheManager:
    """Pools, reference counts and prefix cache of one context group.

    `pages_per_shard` may differ between shards; `offload` is where evicted pages go. All methods are O(pages touched).
    """

    def __init__(
        self,
        page_size: int,
        pages_per_shard: Sequence[int],
        enable_prefix_caching: bool,
        offload: OffloadIndex | None = None,
    ) -> None:
        self.page_size = page_size
        self.pools = [PagePool(pages) for pages in pages_per_shard]
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix = PrefixCache(len(self.pools))
        self.offload = offload
        self._holders: dict[PageRef, int] = {}
        self._loading: set[PageRef] = set()

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.pools)

    def new_table(self) -> PageTable:
        """An empty page table over these shards."""
        return PageTable(self.page_size, self.num_shards)

    def available(self, shard: int) -> int:
        """Pages of `shard` that can be taken now: free ones and idle cached ones."""
        return self.pools[shard].num_free + self.prefix.idle(shard)

    def total_available(self) -> int:
        """Pages of all shards that can be taken now."""
        return sum(self.available(shard) for shard in range(self.num_shards))

    def used(self, shard: int) -> int:
        """Pages of `shard` that requests hold."""
        return self.pools[shard].num_pages - self.available(shard)

    def allocate(self, shard: int, after: int | None = None) -> PageRef:
        """Take a page of `shard`, adjacent to `after` if possible, evicting the oldest idle one if need be."""
        pool = self.pools[shard]
        if not pool.num_free:
            evicted = self.prefix.evict(shard)
            if self.offload:
                self.offload.evicted(evicted)
            pool.release(evicted.index)
        page = PageRef(shard, pool.allocate(after))
        self._holders[page] = 1
        return page

    def match(self, keys: Sequence[Key]) -> list[PageRef]:
        """Hold and return the cached pages of the longest known prefix of `keys`."""
        if not self.enable_prefix_caching:
            return []
        pages = list(self.prefix.lookup(keys))
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self.prefix.set_busy(page)
        return pages

    def publish(self, key: Key, page: PageRef) -> None:
        """Let other requests find a whole, computed page by its content."""
        if self.enable_prefix_caching:
            self.prefix.register(key, page)
            if self.offload and self.prefix.holds(page):
                self.offload.published(key, page)

    @property
    def copies_waiting(self) -> bool:
        """Whether the next step has pages to save or to load."""
        return self.offload is not None and self.offload.copies_waiting

    @property
    def is_loading(self) -> bool:
        """Whether pages are being loaded, by a step in flight or the next one."""
        return bool(self._loading)

    def load(self, key: Key, shard: int, after: int | None) -> PageRef:
        """Take a page of `shard` and have the next step fill it with a key that the offload index has."""
        if self.offload is None:
            raise EngineError("no page can be loaded: nothing is offloaded")
        tier, slot = self.offload.hold(key)  # before allocating, which may evict it
        page = self.allocate(shard, after)
        self._loading.add(page)
        self.offload.load(PageLoad(page, tier, slot, key))
        return page

    def take_copies(self) -> tuple[tuple[PageSave, ...], tuple[PageLoad, ...]]:
        """What the next step must copy between the device and other tiers."""
        return self.offload.take() if self.offload else ((), ())

    def settle(
        self, saves: Sequence[PageSave], loads: Sequence[PageLoad], lost: Collection[int], unsaved: Collection[int]
    ) -> None:
        """A step has made these copies, except the `lost` loads and `unsaved` saves: publish what it loaded."""
        if self.offload:
            self.offload.settle(saves, loads, lost, unsaved)
        for number, load in enumerate(loads):
            if number not in lost:
                self.publish(load.key, load.page)
        pages = [load.page for load in loads]
        self._loading.difference_update(pages)
        self.release(pages)

    def release(self, pages: Iterable[PageRef]) -> None:
        """Let go of pages; give them in position order: the last ones are evicted first."""
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if self.prefix.holds(page):
                self.prefix.set_idle(page)
            else:
                self.pools[page.shard].release(page.index)

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """Raise `EngineError` unless every page is held as the tables say, or idle, or free: one of the three."""
        expected: dict[PageRef, int] = dict.fromkeys(self._loading, 1)
        for table in tables:
            for page in table.pages:
                expected[page] = expected.get(page, 0) + 1
        if expected != self._holders:
            raise EngineError(f"page holders {self._holders} differ from page tables and loads: {expected}")
        idle = self.prefix.idle_pages()
        for shard, pool in enumerate(self.pools):
            free = {PageRef(shard, index) for index in pool.free_pages()}
            held = {page for page in self._holders if page.shard == shard}
            cached = {page for page in idle if page.shard == shard}
            whole = {PageRef(shard, index) for index in range(pool.num_pages)}
            disjoint = len(free) + len(held) + len(cached) == len(whole)
            if free | held | cached != whole or not disjoint or len(free) != pool.num_free:
                raise EngineError(f"shard {shard} lost or shares pages: free {free}, held {held}, idle {cached}")
