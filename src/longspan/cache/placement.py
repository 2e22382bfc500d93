"""Where the next page goes (idea 2: placement follows compute).

It owns the preference among shards; it must not allocate, nor know how many tokens a page holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longspan.cache.manager import CacheManager
from longspan.cache.pages import PageTable


def shard_for_page(cache: CacheManager, table: PageTable, candidates: Iterable[int]) -> int | None:
    """The candidate with room that holds fewest of the request's pages, then the one with most room.

    With pages of one token this is the stripe: consecutive tokens go to consecutive shards.
    """
    roomy = [shard for shard in candidates if cache.available(shard)]
    return min(roomy, key=lambda shard: (table.count(shard), -cache.available(shard)), default=None)


def shard_for_decode(
    cache: CacheManager, table: PageTable, pcp_of_shard: Sequence[int], rows: Sequence[int]
) -> int | None:
    """The shard of a decode token that needs a new page: fewest decode rows on its ranks first.

    `rows[pcp]` counts this step's decode rows; ties go to the shard with fewest pages of the request,
    then to the one with most room.
    """
    roomy = [shard for shard in range(cache.num_shards) if cache.available(shard)]
    return min(
        roomy, key=lambda shard: (rows[pcp_of_shard[shard]], table.count(shard), -cache.available(shard)), default=None
    )


def home_shard(
    cache: CacheManager, pcp_of_shard: Sequence[int], rows: Sequence[int], pages: int, least_pool: int
) -> int | None:
    """The shard where a short context of `pages` pages can sit whole: least busy ranks first, then most room.

    Only shards of at least `least_pool` pages count: what a request that may never leave its home can grow to.
    """
    roomy = [
        shard
        for shard in range(cache.num_shards)
        if cache.available(shard) >= pages and cache.pools[shard].num_pages >= least_pool
    ]
    return min(roomy, key=lambda shard: (rows[pcp_of_shard[shard]], -cache.available(shard)), default=None)
