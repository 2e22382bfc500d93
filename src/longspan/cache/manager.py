"""The pages of all shards: allocation, sharing between requests, release and eviction.

It owns the reference counts, and connects the pools with the prefix cache and the offload index. It must not decide on
which shard a page is placed (`placement.py` does), nor know about ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from longspan.cache.offload import OffloadIndex, PageLoad, PageSave
from longspan.cache.pages import PagePool, PageRef, PageTable
from longspan.cache.prefix import Key, PrefixCache
from longspan.errors import EngineError


class CacheManager:
    """Pools, reference counts and prefix cache of one context group.

    A page is free (in its pool), held (by requests, or by a load in flight) or idle (held by nobody, but found by the
    prefix cache). `pages_per_shard` may differ between shards. With `offload`, evicted pages are saved to other tiers.
    All methods but `check_integrity` take time in proportion to the pages that they change.
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
        self._holders: dict[PageRef, int] = {}  # reference counts of held pages
        self._loading: set[PageRef] = set()  # held by loads: of the next step, and of steps in flight

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.pools)

    def new_table(self) -> PageTable:
        """An empty page table over these shards."""
        return PageTable(self.page_size, self.num_shards)

    def available(self, shard: int) -> int:
        """Number of pages of `shard` that can be allocated now: free and idle ones."""
        return self.pools[shard].num_free + self.prefix.idle(shard)

    def total_available(self) -> int:
        """Number of pages of all shards that can be allocated now."""
        return sum(self.available(shard) for shard in range(self.num_shards))

    def used(self, shard: int) -> int:
        """Number of pages of `shard` that are held."""
        return self.pools[shard].num_pages - self.available(shard)

    def allocate(self, shard: int, after: int | None = None) -> PageRef:
        """Allocate a page of `shard`, the one after page `after` if it is free. Evicts the oldest idle page if needed.

        Raises `KeyError` if no page is free or idle: check `available` first.
        """
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
        """The pages of the longest prefix of `keys` that is cached; the caller holds them from now on."""
        if not self.enable_prefix_caching:
            return []
        pages = list(self.prefix.lookup(keys))
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self.prefix.set_busy(page)
        return pages

    def publish(self, key: Key, page: PageRef) -> None:
        """Enter a full, computed page into the prefix cache, so that other requests find it by its key."""
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
        """Whether a step in flight, or the next step, loads pages."""
        return bool(self._loading)

    def load(self, key: Key, shard: int, after: int | None) -> PageRef:
        """Allocate a page of `shard`, which the next step loads from the tier where the offload index has `key`.

        Raises `EngineError` without an offload index.
        """
        if self.offload is None:
            raise EngineError("no page can be loaded: nothing is offloaded")
        tier, slot = self.offload.hold(key)  # before `allocate`, whose eviction may reuse the slot
        page = self.allocate(shard, after)
        self._loading.add(page)
        self.offload.load(PageLoad(page, tier, slot, key))
        return page

    def take_copies(self) -> tuple[tuple[PageSave, ...], tuple[PageLoad, ...]]:
        """The copies between the device and other tiers that the next step must make; they are returned once."""
        return self.offload.take() if self.offload else ((), ())

    def settle(self, saves: Sequence[PageSave], loads: Sequence[PageLoad], lost: Collection[int]) -> None:
        """A step has made these copies: publish the loaded pages. `lost` are the indices of loads that failed."""
        if self.offload:
            self.offload.settle(saves, loads, lost)
        for number, load in enumerate(loads):
            if number not in lost:
                self.publish(load.key, load.page)
        pages = [load.page for load in loads]
        self._loading.difference_update(pages)
        self.release(pages)

    def release(self, pages: Iterable[PageRef]) -> None:
        """Stop holding pages, given in position order. Of those that become idle the last is evicted first."""
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
        """Raise `EngineError` unless every page is either free, idle, or held as often as tables and loads say."""
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
