"""On which shard the next page is placed (idea 2 of docs/architecture.md: placement follows compute).

It owns the order of preference among shards; it must not allocate pages, nor know how many tokens a page holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longspan.cache.manager import CacheManager
from longspan.cache.pages import PageTable


def shard_for_page(cache: CacheManager, table: PageTable, candidates: Iterable[int]) -> int | None:
    """The candidate shard with fewest of the request's pages; of equal ones the one with most room. None without room.

    With pages of one token this interleaves tokens: adjacent tokens are on adjacent shards.
    """
    roomy = [shard for shard in candidates if cache.available(shard)]
    return min(roomy, key=lambda shard: (table.count(shard), -cache.available(shard)), default=None)


def shard_for_decode(
    cache: CacheManager, table: PageTable, pcp_of_shard: Sequence[int], rows: Sequence[int]
) -> int | None:
    """The shard of a decode token's new page: the one whose ranks have the fewest decode rows in this step.

    `rows[pcp]` counts these rows. Of equal shards the one with fewest of the request's pages is chosen, then the one
    with most room. None without room.
    """
    roomy = [shard for shard in range(cache.num_shards) if cache.available(shard)]
    return min(
        roomy, key=lambda shard: (rows[pcp_of_shard[shard]], table.count(shard), -cache.available(shard)), default=None
    )


def home_shard(
    cache: CacheManager, pcp_of_shard: Sequence[int], rows: Sequence[int], pages: int, least_pool: int
) -> int | None:
    """The home of a short context: a shard with room for `pages` pages whose ranks have the fewest rows.

    `rows[pcp]` counts the rows of this step. Of equal shards the one with most room is chosen. Shards of fewer than
    `least_pool` pages are left out: a request that must not leave its home can grow to that. None if no shard fits.
    """
    roomy = [
        shard
        for shard in range(cache.num_shards)
        if cache.available(shard) >= pages and cache.pools[shard].num_pages >= least_pool
    ]
    return min(roomy, key=lambda shard: (rows[pcp_of_shard[shard]], -cache.available(shard)), default=None)
