"""Pages: the pool of one shard's free pages, and the page table of one request (idea 1 of docs/architecture.md).

It owns page indices and the order of a request's pages; it must not know which rank computes what, nor hold tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class PageRef(NamedTuple):
    """The address of a page."""

    # member of the context group that stores it
    shard: int
    # index in this shard's pool
    index: int  # type: ignore[assignment]


class Span(NamedTuple):
    """A run of adjacent slots of a shard. A slot is the place of one token: page index · page size + offset."""

    # first slot
    slot: int
    # number of slots
    length: int


def clip_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The slots of tokens [start, stop) of the concatenated `spans`. Tokens behind their end are ignored."""
    found: list[Span] = []
    at = 0
    for span in spans:
        low, high = max(start - at, 0), min(stop - at, span.length)
        if low < high:
            found.append(Span(span.slot + low, high - low))
        at += span.length
    return found


class PagePool:
    """The free pages of one shard, kept as runs of adjacent pages, so that a request's pages can be adjacent.

    A request is given the page after its last one, if that is free. Otherwise, and when it starts, it is given the
    middle of the longest free run, so that both it and the request before it have room to grow.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._stop_of: dict[int, int] = {0: num_pages}  # free runs [start, stop), by start
        self._start_of: dict[int, int] = {num_pages: 0}  # the same runs, by stop

    def allocate(self, after: int | None = None) -> int:
        """The index of a page that was free, the one after page `after` if possible. Raises IndexError if none is."""
        if not self.num_free:
            raise IndexError("no free page in this shard")
        if after is not None and after + 1 in self._stop_of:
            return self._take(after + 1, after + 1)
        start, stop = max(self._stop_of.items(), key=lambda run: run[1] - run[0])
        untouched = self.num_free == self.num_pages
        return self._take(start, start if untouched else (start + stop) // 2)

    def release(self, index: int) -> None:
        """Free a page, and join it with the free runs on both sides."""
        start, stop = index, index + 1
        if start in self._start_of:
            start = self._start_of.pop(start)
            del self._stop_of[start]
        if stop in self._stop_of:
            stop = self._stop_of.pop(stop)
            del self._start_of[stop]
        self._add_run(start, stop)
        self.num_free += 1

    def free_pages(self) -> set[int]:
        """The indices of all free pages, for integrity checks."""
        return {index for start, stop in self._stop_of.items() for index in range(start, stop)}

    def _take(self, run_start: int, index: int) -> int:
        """Take page `index` out of the free run that begins at `run_start`."""
        stop = self._stop_of.pop(run_start)
        del self._start_of[stop]
        self._add_run(run_start, index)
        self._add_run(index + 1, stop)
        self.num_free -= 1
        return index

    def _add_run(self, start: int, stop: int) -> None:
        if start < stop:
            self._stop_of[start] = stop
            self._start_of[stop] = start


class PageOnShard(NamedTuple):
    """What a shard has of the positions [first, stop) of one page."""

    # first position of the page
    first: int
    # position after its last
    stop: int
    # position p is at slot `slot` + p; None if the page is on another shard
    slot: int | None
    # the request's tokens on the shard in earlier pages
    before: int


class ShardPages:
    """One request's pages on one shard, in position order. Pages that are adjacent in the pool form runs."""

    __slots__ = ("last", "ordinals", "page", "run_first", "run_index")

    def __init__(self) -> None:
        self.page = PageOnShard(0, 0, None, 0)  # the last that was asked for: see `PageTable.page_on`
        self.ordinals: list[int] = []  # each page's number in the request's page table
        self.run_first: list[int] = []  # for each run, how many of these pages come before it
        self.run_index: list[int] = []  # for each run, the pool index of its first page
        self.last = -2  # pool index of the last page; before the first page a value that none follows

    def append(self, ordinal: int, index: int) -> None:
        """Add page number `ordinal` of the table, which has pool index `index`."""
        if index != self.last + 1:
            self.run_first.append(len(self.ordinals))
            self.run_index.append(index)
        self.ordinals.append(ordinal)
        self.last = index

    def visible(self, until: int, page_size: int) -> int:
        """See `PageTable.visible`."""
        ordinals = self.ordinals
        if not ordinals:
            return 0
        page, rest = divmod(until, page_size)
        if page > ordinals[-1]:  # a decode row sees all of them: skip the search
            return len(ordinals) * page_size
        whole = len(ordinals) - 1 if page == ordinals[-1] else bisect_left(ordinals, page)
        partly = rest if ordinals[whole] == page else 0
        return whole * page_size + partly

    def spans(self, tokens: int, page_size: int) -> tuple[Span, ...]:
        """The slots of the first `tokens` tokens on the shard."""
        found: list[Span] = []
        for first, index in zip(self.run_first, self.run_index, strict=True):
            left = tokens - first * page_size
            if left <= 0:
                break
            if found:  # the run before was given all that was left: it ends where this run begins
                before = found[-1]
                found[-1] = Span(before.slot, before.length - left)
            found.append(Span(index * page_size, left))
        return tuple(found)


class PageTable:
    """The pages of one request, in position order.

    Position p is in page number p // page_size of the list, at offset p % page_size. The shard of a position is read
    from the list, and never computed from a number of ranks.
    """

    def __init__(self, page_size: int, num_shards: int) -> None:
        self.page_size = page_size
        self.pages: list[PageRef] = []
        self._shards = [ShardPages() for _ in range(num_shards)]

    def append(self, page: PageRef) -> None:
        """Append the page of the next `page_size` positions."""
        self._shards[page.shard].append(len(self.pages), page.index)
        self.pages.append(page)

    def extend(self, pages: Sequence[PageRef]) -> None:
        """Append several pages, in position order."""
        for page in pages:
            self.append(page)

    def on(self, shard: int) -> ShardPages:
        """The request's pages on `shard`."""
        return self._shards[shard]

    def count(self, shard: int) -> int:
        """Number of this request's pages on `shard`."""
        return len(self._shards[shard].ordinals)

    def last_index(self, shard: int) -> int | None:
        """Pool index of this request's last page on `shard`; None if it has none there."""
        pages = self._shards[shard]
        return pages.last if pages.ordinals else None

    def page_on(self, shard: int, position: int) -> PageOnShard:
        """The page of `position`, as `shard` sees it. It is kept as `on(shard).page`: the next token has the same."""
        number, pages = position // self.page_size, self._shards[shard]
        first, found = number * self.page_size, self.pages[number]
        slot = found.index * self.page_size - first if found.shard == shard else None
        pages.page = PageOnShard(first, first + self.page_size, slot, pages.visible(first, self.page_size))
        return pages.page

    def shard_of(self, position: int) -> int:
        """The shard that stores `position`."""
        return self.pages[position // self.page_size].shard

    def visible(self, shard: int, until: int) -> int:
        """Number of the request's tokens on `shard` with a position below `until`.

        A shard's pages are kept in position order, so these tokens are a prefix of the shard's tokens.
        """
        return self._shards[shard].visible(until, self.page_size)

    def spans(self, shard: int, until: int) -> tuple[Span, ...]:
        """The slots of the positions below `until` on `shard`, in position order."""
        return self._shards[shard].spans(self.visible(shard, until), self.page_size)

    def spans_of_all(self, start: int, stop: int, first_slots: Sequence[int]) -> list[Span]:
        """The slots of positions [start, stop) on all shards, in position order.

        Slots of shard s are counted from `first_slots[s]`.
        """
        found: list[Span] = []
        position = start
        while position < stop:
            number, offset = divmod(position, self.page_size)
            page = self.pages[number]
            length = min(self.page_size - offset, stop - position)
            slot = first_slots[page.shard] + page.index * self.page_size + offset
            if found and found[-1].slot + found[-1].length == slot:
                found[-1] = Span(found[-1].slot, found[-1].length + length)
            else:
                found.append(Span(slot, length))
            position += length
        return found

    def slots(self, shard: int, start: int, stop: int) -> list[tuple[int, Span]]:
        """The slots of those positions in [start, stop) that are on `shard`, as (offset from `start`, slots)."""
        found: list[tuple[int, Span]] = []
        position = start
        while position < stop:
            number, row = divmod(position, self.page_size)
            page = self.pages[number]
            length = min(self.page_size - row, stop - position)
            if page.shard == shard:
                slot = page.index * self.page_size + row
                if (
                    found
                    and found[-1][1].slot + found[-1][1].length == slot
                    and (found[-1][0] + found[-1][1].length == position - start)
                ):
                    offset, span = found.pop()
                    found.append((offset, Span(span.slot, span.length + length)))
                else:
                    found.append((position - start, Span(slot, length)))
            position += length
        return found
