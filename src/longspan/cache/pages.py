"""Pages: where tokens live (idea 1). The pool of one shard, and the page table of one request.

It owns page indices and the order of a request's pages; it must not know which rank computes
what, nor hold any tensor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class PageRef(NamedTuple):
    """A page: its shard (member of the context group) and its index in that shard's pool."""

    shard: int
    index: int  # type: ignore[assignment]


class Span(NamedTuple):
    """A run of adjacent slots (rows of a rank's pool)."""

    slot: int
    length: int


def clip_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The slots of tokens [start, stop), counted over `spans` one behind the other."""
    found: list[Span] = []
    at = 0
    for span in spans:
        low, high = max(start - at, 0), min(stop - at, span.length)
        if low < high:
            found.append(Span(span.slot + low, high - low))
        at += span.length
    return found


class PagePool:
    """The free pages of one shard, kept as runs so that a request's pages can be adjacent.

    A request's next page is the one after its last wherever that is free; a request that starts
    takes the middle of the longest free run, which leaves room behind it.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._stop_of: dict[int, int] = {0: num_pages}
        self._start_of: dict[int, int] = {num_pages: 0}

    def allocate(self, after: int | None = None) -> int:
        """Take a free page, the one behind page `after` if possible. Raises IndexError if none is free."""
        if not self.num_free:
            raise IndexError("no free page in this shard")
        if after is not None and after + 1 in self._stop_of:
            return self._take(after + 1, after + 1)
        start, stop = max(self._stop_of.items(), key=lambda run: run[1] - run[0])
        untouched = self.num_free == self.num_pages
        return self._take(start, start if untouched else (start + stop) // 2)

    def release(self, index: int) -> None:
        """Give a page back, joining the free runs beside it."""
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
        """Every free index: for integrity checks."""
        return {index for start, stop in self._stop_of.items() for index in range(start, stop)}

    def _take(self, run_start: int, index: int) -> int:
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


class _ShardPages:
    """One request's pages on one shard, in position order, with adjacent ones joined into runs."""

    __slots__ = ("last", "ordinals", "run_first", "run_index")

    def __init__(self) -> None:
        self.ordinals: list[int] = []
        self.run_first: list[int] = []  # how many of the shard's pages lie before each run
        self.run_index: list[int] = []  # pool index of each run's first page
        self.last = -2

    def append(self, ordinal: int, index: int) -> None:
        if index != self.last + 1:
            self.run_first.append(len(self.ordinals))
            self.run_index.append(index)
        self.ordinals.append(ordinal)
        self.last = index

    def spans(self, tokens: int, page_size: int) -> tuple[Span, ...]:
        found: list[Span] = []
        for first, index in zip(self.run_first, self.run_index, strict=True):
            left = tokens - first * page_size
            if left <= 0:
                break
            if found:
                before = found[-1]
                found[-1] = Span(before.slot, before.length - left)
            found.append(Span(index * page_size, left))
        return tuple(found)


class PageTable:
    """The pages of one request, in position order.

    Position p lies in page number p // page_size of this list, at row p % page_size. Every question about
    an owner is answered from the list; nothing is computed from a number of ranks.
    """

    def __init__(self, page_size: int, num_shards: int) -> None:
        self.page_size = page_size
        self.pages: list[PageRef] = []
        self._shards = [_ShardPages() for _ in range(num_shards)]

    def append(self, page: PageRef) -> None:
        """Add the page that holds the next `page_size` positions."""
        self._shards[page.shard].append(len(self.pages), page.index)
        self.pages.append(page)

    def extend(self, pages: Sequence[PageRef]) -> None:
        """Add several pages."""
        for page in pages:
            self.append(page)

    def count(self, shard: int) -> int:
        """How many pages of this request lie on `shard`."""
        return len(self._shards[shard].ordinals)

    def last_index(self, shard: int) -> int | None:
        """Pool index of this request's latest page on `shard`."""
        pages = self._shards[shard]
        return pages.last if pages.ordinals else None

    def shard_of(self, position: int) -> int:
        """The shard that holds `position`."""
        return self.pages[position // self.page_size].shard

    def visible(self, shard: int, until: int) -> int:
        """How many of `shard`'s tokens have a position below `until`.

        A shard's pages are in position order, so they are its first ones.
        """
        ordinals = self._shards[shard].ordinals
        if not ordinals:
            return 0
        page, rest = divmod(until, self.page_size)
        if page > ordinals[-1]:  # a decode sees them all: no search in a long context
            return len(ordinals) * self.page_size
        whole = bisect_left(ordinals, page)
        partly = rest if whole < len(ordinals) and ordinals[whole] == page else 0
        return whole * self.page_size + partly

    def spans(self, shard: int, until: int) -> tuple[Span, ...]:
        """The slots of `shard` that hold positions below `until`, in position order, as adjacent runs."""
        return self._shards[shard].spans(self.visible(shard, until), self.page_size)

    def slots(self, shard: int, start: int, stop: int) -> list[tuple[int, Span]]:
        """Where positions [start, stop) that lie on `shard` go: (offset from `start`, slots)."""
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
