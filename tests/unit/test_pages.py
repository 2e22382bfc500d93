"""Where a token lives is data: pools, page tables, and what a shard sees (ideas 1 and 4)."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longspan.cache.manager import CacheManager
from longspan.cache.pages import PagePool, PageRef, PageTable, Span
from longspan.cache.prefix import page_key, root_key
from longspan.errors import EngineError


class Pool(RuleBasedStateMachine):
    """A pool never hands out a page twice and never loses one."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(12)
        self.taken = set()

    @precondition(lambda self: self.pool.num_free)
    @rule(after=st.none() | st.integers(0, 11))
    def allocate(self, after):
        adjacent = after is not None and after + 1 < 12 and after + 1 not in self.taken
        page = self.pool.allocate(after)
        assert page not in self.taken
        if adjacent and page != after + 1:
            # only a page in the middle of a free run can be missed: its run starts earlier
            assert after not in self.taken
        self.taken.add(page)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(sorted(self.taken)))
        self.taken.remove(page)
        self.pool.release(page)

    @invariant()
    def free_and_taken_are_all_pages(self):
        assert self.pool.free_pages() == set(range(12)) - self.taken
        assert self.pool.num_free == 12 - len(self.taken)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)  # 12 pages are soon full


def test_a_full_pool_says_so():
    pool = PagePool(1)
    pool.allocate()
    with pytest.raises(IndexError, match="no free page"):
        pool.allocate()


def test_a_growing_request_gets_adjacent_pages():
    pool = PagePool(100)
    first, other = pool.allocate(), pool.allocate()
    pages = [first]
    for _ in range(20):
        pages.append(pool.allocate(pages[-1]))
    assert pages == list(range(first, first + 21))
    assert other not in pages


@st.composite
def tables(draw):
    """A page table over a few shards, and where each position really is."""
    size, shards = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    table = PageTable(size, shards)
    pools = [list(range(30)) for _ in range(shards)]
    for shard in draw(st.lists(st.integers(0, shards - 1), min_size=1, max_size=12)):
        index = draw(st.sampled_from(pools[shard]))
        pools[shard].remove(index)
        table.append(PageRef(shard, index))
    where = [(page.shard, page.index * size + row) for page in table.pages for row in range(size)]
    return table, shards, where


@given(tables(), st.data())
@settings(max_examples=200, deadline=None)
def test_visible_spans_are_the_slots_of_earlier_positions_in_order(case, data):
    table, shards, where = case
    until = data.draw(st.integers(0, len(where)))
    for shard in range(shards):
        expected = [slot for owner, slot in where[:until] if owner == shard]
        spans = table.spans(shard, until)
        assert [s for span in spans for s in range(span.slot, span.slot + span.length)] == expected
        assert table.visible(shard, until) == len(expected)
        assert all(a.slot + a.length != b.slot for a, b in pairwise(spans))


@given(tables(), st.data())
@settings(max_examples=200, deadline=None)
def test_write_slots_cover_exactly_a_shards_positions(case, data):
    table, shards, where = case
    start = data.draw(st.integers(0, len(where)))
    stop = data.draw(st.integers(start, len(where)))
    written = {}
    for shard in range(shards):
        for offset, span in table.slots(shard, start, stop):
            for step in range(span.length):
                written[start + offset + step] = (shard, span.slot + step)
    assert written == {position: where[position] for position in range(start, stop)}


def test_adjacent_pages_become_one_span():
    table = PageTable(4, 2)
    table.extend([PageRef(0, 3), PageRef(1, 9), PageRef(0, 4), PageRef(0, 7)])
    assert table.spans(0, 16) == (Span(12, 8), Span(28, 4))
    assert table.spans(0, 10) == (Span(12, 6),)


def test_cached_pages_are_shared_and_evicted_oldest_first_only_when_idle():
    cache = CacheManager(2, [3], enable_prefix_caching=True)
    root = root_key("model")
    key_a, key_b = page_key(root, [1, 2]), page_key(root, [3, 4])
    a, b = cache.allocate(0), cache.allocate(0)
    cache.publish(key_a, a)
    cache.publish(key_b, b)
    cache.release([a])
    cache.release([b])
    assert cache.match([key_a]) == [a]
    assert cache.allocate(0) not in (a, b)
    assert cache.allocate(0) == b, "b is idle, a is in use and cannot be evicted"
    assert cache.match([key_b]) == []
    assert cache.available(0) == 0


def test_the_page_that_nobody_has_held_for_longest_is_evicted_first():
    cache = CacheManager(2, [3], enable_prefix_caching=True)
    pages = [cache.allocate(0) for _ in range(3)]
    keys = [page_key(root_key("model"), [n, n]) for n in range(3)]
    for key, page in zip(keys, pages, strict=True):
        cache.publish(key, page)
    for number in (1, 0, 2):
        cache.release([pages[number]])
    cache.release(cache.match([keys[1]]))  # used once more
    assert [cache.allocate(0) for _ in range(3)] == [pages[0], pages[2], pages[1]]


def test_two_holders_of_a_page_and_one_lets_go():
    cache = CacheManager(2, [2], enable_prefix_caching=True)
    key = page_key(root_key("model"), [1, 2])
    page = cache.allocate(0)
    cache.publish(key, page)
    assert cache.match([key]) == [page]
    cache.release([page])
    assert cache.available(0) == 1, "the other holder still has it"


def test_keys_cover_parent_tokens_and_model():
    root = root_key("model", "float32")
    keys = {
        page_key(root, [1, 2]),
        page_key(root, [2, 1]),
        page_key(page_key(root, [1, 2]), [1, 2]),
        page_key(root_key("model", "bfloat16"), [1, 2]),
        page_key(root_key("other", "float32"), [1, 2]),
    }
    assert len(keys) == 5
    assert page_key(root, [1, 2]) == page_key(root_key("model", "float32"), [1, 2])


def test_the_integrity_check_notices_a_lost_page():
    cache = CacheManager(2, [2], enable_prefix_caching=True)
    cache.allocate(0)
    with pytest.raises(EngineError, match="page holders"):
        cache.check_integrity([])
