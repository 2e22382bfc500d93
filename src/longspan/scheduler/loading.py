"""Offloaded pages of a waiting request, which are loaded from host memory or disk before it is admitted.

It owns which pages are worth loading and to which shards they are loaded; it must not know how they are copied, nor
which requests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.cache.manager import CacheManager
from longspan.cache.offload import OffloadIndex
from longspan.cache.placement import home_shard, shard_for_page
from longspan.cache.prefix import Key
from longspan.config import SchedulerConfig
from longspan.parallel.grid import Grid
from longspan.scheduler.sequence import SequenceState


@dataclass(frozen=True)
class PageLoader:
    """Loads offloaded pages for a request one step before the request can use them.

    Loaded pages join the prefix cache when the step that loads them is committed, and the request matches them there.
    A page that proves missing or damaged is not published, so nothing is computed from it. A step loads no more tokens
    than it may compute, so that decodes do not wait for long loads.
    """

    # budget of a step, and when a context is local
    config: SchedulerConfig
    # pages, prefix cache and offload index
    cache: CacheManager
    # which ranks store which shard
    grid: Grid

    def must_wait(self, sequence: SequenceState, keys: Sequence[Key]) -> bool:
        """True if the request must wait: its next pages are already loading, or this call starts loading them.

        `keys` are those of the full pages that follow the pages in the table of `sequence`.
        """
        offload = self.cache.offload
        if offload is None or not keys:
            return False
        if offload.is_busy(keys[0]):
            return True
        most = max(1, self.config.step_tokens // self.cache.page_size) - offload.loads_waiting
        wanted = self._worth_loading(offload, keys[: max(1, most)])
        return bool(wanted) and (most <= 0 or self._load(offload, sequence, wanted))

    def _worth_loading(self, offload: OffloadIndex, keys: Sequence[Key]) -> Sequence[Key]:
        """The longest prefix of `keys` whose pages are not on the device and take less time to load than to compute."""
        for count, key in enumerate(keys):
            tier = offload.find(key)
            if tier is None or offload.is_busy(key) or next(self.cache.prefix.lookup([key]), None):
                return keys[:count]
            if not offload.rates.pays(tier, self.cache.page_size):
                return keys[:count]
        return keys

    def _load(self, offload: OffloadIndex, sequence: SequenceState, keys: Sequence[Key]) -> bool:
        """Load pages as far as there is room. False if no page could be loaded."""
        shards = self._shards_for(sequence)
        table = self.cache.new_table()
        table.extend(sequence.table.pages)
        for key in keys:
            shard = shard_for_page(self.cache, table, shards)
            if shard is None or not self._worth_loading(offload, [key]):  # an allocation before may have dropped it
                break
            table.append(self.cache.load(key, shard, table.last_index(shard)))
        return len(table.pages) > len(sequence.table.pages)

    def _shards_for(self, sequence: SequenceState) -> Sequence[int]:
        """The shards to which a request's pages are loaded: one for a short context, else all."""
        everywhere = range(self.cache.num_shards)
        strict = self.config.schedule == "local"
        if not strict and len(sequence.tokens) > self.config.local_limit:
            return everywhere
        held = {page.shard for page in sequence.table.pages}
        if len(held) == 1:
            return tuple(held)
        least = sequence.max_pages if strict else 0
        idle = [0] * self.grid.pcp
        home = home_shard(self.cache, self.grid.pcp_of_shard, idle, sequence.pages_missing, least)
        return everywhere if home is None else (home,)
