"""Offload as the driver sees it: what is where, what a step copies, and that no slot is used while ranks are at it."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import ConfigError
from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import AttentionShape, GroupShape
from longspan.cache.manager import CacheManager
from longspan.cache.offload import LoadRates, OffloadIndex, PageLoad, PageSave, Spill, Tier
from longspan.cache.pages import PageRef
from longspan.cache.prefix import page_key, root_key
from longspan.config import CacheConfig, EngineConfig, OffloadConfig, ParallelConfig, SchedulerConfig
from longspan.parallel.grid import Grid
from longspan.plan.mirror import Mirror
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.request import CoreRequest, SampledToken, SamplingParams
from longspan.scheduler.scheduler import Scheduler

ROOT = root_key("test")


class Rank:
    """One shard's rank: carries out plans in order, whenever it is told to, and checks all it reads."""

    def __init__(self, world, shard):
        self.world, self.shard = world, shard
        self.plans: deque[StepPlan] = deque()
        self.mirror = Mirror(world.page_size, world.cache.num_shards)
        self.rows: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, row) -> tokens up to there

    def run(self):
        plan = self.plans.popleft()
        size, slots = self.world.page_size, self.world.slots
        for save in plan.saves:
            if save.page.shard == self.shard:
                if save.spill:
                    moved = slots[Tier.MEMORY, save.slot]
                    assert self.world.key_of(moved) == save.spill.key
                    slots[Tier.DISK, save.spill.slot] = moved
                content = self.rows[save.page.index, size - 1]
                assert self.world.key_of(content) == save.key
                slots[save.tier, save.slot] = content
        for number, load in enumerate(plan.loads):
            if load.page.shard != self.shard:
                continue
            content = slots[load.tier, load.slot]
            assert self.world.key_of(content) == load.key
            if self.world.breaks(load.key):
                self.world.lost[plan.step].add(number)
                content = (-7,) * len(content)  # must never be read
            for row in range(size):
                self.rows[load.page.index, row] = content[: len(content) - size + row + 1]
        self._compute(plan, size)

    def _compute(self, plan, size):
        self.mirror.apply(plan)
        for segment in plan.segments:
            tokens = self.world.tokens[segment.request_id]
            for position in range(segment.stop):
                page = self.mirror.table(segment.request_id).pages[position // size]
                if page.shard != self.shard:
                    continue
                if position >= segment.start:
                    self.rows[page.index, position % size] = tuple(tokens[: position + 1])
                assert self.rows[page.index, position % size] == tuple(tokens[: position + 1])


class World:
    """A scheduler with tiers, and ranks that need not keep step with each other between its commits."""

    def __init__(self, pages=(8,), memory=16, disk=16, pcp=1, pp=1, page_size=2, breaks=lambda key: False, **options):
        self.grid = Grid(ParallelConfig(1, pcp, 1, pp))
        self.page_size, self.breaks = page_size, breaks
        self.index = OffloadIndex(memory, disk)
        self.cache = CacheManager(page_size, pages * pcp if len(pages) == 1 else pages, True, self.index)
        config = SchedulerConfig(**{"max_num_batched_tokens": 16, "max_num_seqs": 8, "local_context": 0, **options})
        group = GroupShape(self.grid.shards_of_pcp, self.grid.nodes(self.grid.context_group(0)))
        chooser = ScheduleChooser(CostModel(AttentionShape(4, 2, 8, 4), group, SCHEDULES), config.schedule)
        self.scheduler = Scheduler(config, self.cache, self.grid, chooser, ROOT)
        self.ranks = [Rank(self, shard) for shard in range(self.cache.num_shards)]
        self.slots: dict[tuple[Tier, int], tuple[int, ...]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.left: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.lost: dict[int, set[int]] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []

    def key_of(self, tokens):
        key = ROOT
        for start in range(0, len(tokens), self.page_size):
            key = page_key(key, tokens[start : start + self.page_size])
        return key

    def add(self, request_id, prompt, max_tokens=1):
        self.scheduler.add(CoreRequest(request_id, prompt, SamplingParams(), 0, max_tokens))
        self.tokens[request_id], self.left[request_id] = list(prompt), max_tokens

    def submit(self):
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        assert StepPlan.decode(plan.encode()) == plan
        self.plans.append(plan)
        self.in_flight.append(plan)
        self.lost[plan.step] = set()
        for rank in self.ranks:
            rank.plans.append(plan)
        return True

    def commit(self):
        plan = self.in_flight.popleft()
        for rank in self.ranks:
            while plan in rank.plans:
                rank.run()
        sampled = tuple(SampledToken(s.request_id, s.stop % 3) for s in plan.segments if s.sample)
        result = StepResult(sampled, failed_loads=tuple(self.lost[plan.step]))
        for token in self.scheduler.commit(plan, result).tokens:
            self.tokens[token.request_id].append(token.token_id)
            self.cached[token.request_id] = self.scheduler.cached_tokens(token.request_id)
            self.left[token.request_id] -= 1
            if not self.left[token.request_id]:
                self.scheduler.finish(token.request_id)
        self.scheduler.check_integrity()

    def run(self, choose=lambda options: options - 1, limit=3000):
        """To the end; `choose(n)` gives numbers below n: how far each rank runs before the next commit."""
        for _ in range(limit):
            while len(self.in_flight) < self.scheduler.steps_at_once and self.submit():
                for rank in self.ranks:
                    for _ in range(choose(len(rank.plans) + 1)):
                        rank.run()
            if not self.in_flight:
                return self
            self.commit()
        raise AssertionError("the scheduler does not come to an end")

    def ask(self, request_id, prompt, max_tokens=1):
        """Serve one request alone; returns its plans."""
        before = len(self.plans)
        self.add(request_id, prompt, max_tokens)
        self.run()
        return self.plans[before:]


@st.composite
def worlds(draw):
    pcp, pp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    broken = draw(st.sampled_from([0, 40, 255]))
    world = World(
        tuple(draw(st.lists(st.integers(8, 12), min_size=pcp, max_size=pcp))), draw(st.integers(0, 6)),
        draw(st.integers(1, 9)), pcp, pp, draw(st.sampled_from([1, 2, 3])), lambda key: key[0] < broken,
        max_num_batched_tokens=draw(st.sampled_from([5, 16])), max_num_seqs=3,
        local_context=draw(st.sampled_from([0, 6])), schedule=draw(st.sampled_from(["auto", "local"])),
    )  # fmt: skip
    most = 8 * world.page_size - 4
    for request_id in range(draw(st.integers(2, 12))):
        shared = draw(st.integers(0, most))
        prompt = [draw(st.sampled_from([1, 2, 3]))] * shared + [10 + request_id] * draw(st.integers(1, 4))
        world.add(str(request_id), prompt[:most], draw(st.integers(1, 4)))
    return world


@pytest.mark.slow
@given(worlds(), st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_is_read_is_what_was_saved_however_far_ranks_drift_and_every_request_ends(world, data):
    world.run(lambda options: data.draw(st.integers(0, options - 1)))
    assert not any(world.left.values())
    assert all(world.cache.used(shard) == 0 for shard in range(world.cache.num_shards))


def test_an_evicted_prompt_comes_back_in_a_step_of_its_own():
    world = World()
    prompt = [1] * 9
    world.ask("0", prompt)
    world.ask("1", [2] * 15)
    load, rest = world.ask("2", prompt)
    assert (len(load.loads), load.segments) == (4, ())
    assert [segment.start for segment in rest.segments] == [8]
    assert world.cached["2"] == 8


def test_it_comes_back_to_any_shard():
    world = World(pages=(6, 6, 6), pcp=3, schedule="auto")
    prompt = [1] * 15
    world.ask("0", prompt)
    world.ask("1", [2] * 33)
    pages = {save.key: save.page.shard for plan in world.plans for save in plan.saves}
    loads = [load for plan in world.ask("2", prompt) for load in plan.loads]
    assert {load.page.shard for load in loads} == {0, 1, 2}
    assert any(load.page.shard != pages[load.key] for load in loads)


def test_a_short_context_comes_back_to_one_shard():
    world = World(pages=(8, 8), pcp=2, local_context=16)
    world.ask("0", [1] * 13)
    world.ask("1", [2] * 31)
    loads = [load for plan in world.ask("2", [1] * 13) for load in plan.loads]
    assert len(loads) == 6
    assert len({load.page.shard for load in loads}) == 1


def test_two_requests_load_a_prefix_once():
    world = World(pages=(24,))
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 47)
    world.add("2", [1] * 9)
    world.add("3", [*[1] * 8, 4])
    before = len(world.plans)
    world.run()
    assert sum(len(plan.loads) for plan in world.plans[before:]) == 4
    assert world.cached["2"] == world.cached["3"] == 8


def test_others_are_served_while_a_request_loads():
    world = World(pages=(24,))
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 47)
    world.add("2", [1] * 9)
    world.add("3", [5] * 3)
    assert world.submit()
    plan = world.plans[-1]
    assert plan.loads
    assert [segment.request_id for segment in plan.segments] == ["3"]


def test_a_step_loads_no_more_tokens_than_it_may_compute():
    world = World(pages=(24,), memory=64, max_num_batched_tokens=8)
    world.ask("0", [1] * 41)
    world.ask("1", [2] * 47)
    plans = world.ask("2", [1] * 41)
    assert [len(plan.loads) for plan in plans if plan.loads] == [4] * 5
    assert world.cached["2"] == 40


def test_a_lost_page_is_computed_again_and_the_ones_before_it_are_not():
    bad = page_key(page_key(ROOT, [1, 1]), [1, 1])
    world = World(breaks=lambda key: key == bad)
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 15)
    plans = world.ask("2", [1] * 9)
    assert world.cached["2"] == 2
    assert min(segment.start for plan in plans for segment in plan.segments) == 2
    assert (world.index.counters.lost, world.index.counters.loaded_from_memory) == (1, 3)
    assert world.index.find(bad) is None


def test_pages_slower_to_load_than_to_compute_are_computed():
    world = World()
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 15)
    world.index.rates = LoadRates(token=1.0, page={Tier.MEMORY: 2.0})
    world.ask("2", [1] * 9)
    assert world.cached["2"] == 0
    assert world.index.counters.loaded_from_memory == 0


def test_pages_the_device_has_are_not_loaded():
    world = World()
    prompt = [1] * 9
    world.ask("0", prompt)
    world.ask("1", [2] * 15)
    third = world.cache.allocate(0)
    world.cache.publish(world.key_of(prompt[:6]), third)
    world.cache.release([third])
    world.ranks[0].rows.update({(third.index, row): tuple(prompt[: 5 + row]) for row in range(2)})
    assert [len(plan.loads) for plan in world.ask("2", prompt) if plan.loads] == [2, 1]
    assert world.cached["2"] == 8


def test_pages_that_the_room_made_for_others_has_cost_are_computed():
    world = World(memory=4, disk=0)
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 15)
    world.ask("2", [1] * 9)
    assert 0 < world.index.counters.loaded_from_memory < 4
    assert world.cached["2"] == 2 * world.index.counters.loaded_from_memory


def test_prompts_to_be_scored_load_nothing():
    world = World()
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 15)
    world.scheduler.add(CoreRequest("2", [1] * 9, SamplingParams(prompt_logprobs=1), 0, 1))
    world.tokens["2"], world.left["2"] = [1] * 9, 1
    assert world.submit()
    assert not world.plans[-1].loads


def test_an_aborted_request_leaves_what_it_was_loading_to_others():
    world = World()
    world.ask("0", [1] * 9)
    world.ask("1", [2] * 15)
    world.add("2", [1] * 9)
    world.submit()
    world.scheduler.finish("2")
    world.commit()
    (plan,) = world.ask("3", [1] * 9)
    assert not plan.loads
    assert world.cached["3"] == 8


def index_with(memory, disk, *keys):
    """An index into whose tiers these keys were evicted, one a step."""
    index = OffloadIndex(memory, disk)
    for key in keys:
        evict(index, key)
    return index


def evict(index, key, settle=True):
    index.published(key, PageRef(0, 0))
    index.evicted(PageRef(0, 0))
    saves, loads = index.take()
    if settle:
        index.settle(saves, loads, ())
    return saves


def test_pages_go_to_memory_then_to_disk_then_away_the_oldest_first():
    index = index_with(2, 1, b"a", b"b", b"c")
    assert [index.find(key) for key in (b"a", b"b", b"c")] == [Tier.DISK, Tier.MEMORY, Tier.MEMORY]
    evict(index, b"d")
    assert [index.find(key) for key in (b"a", b"b", b"c")] == [None, Tier.DISK, Tier.MEMORY]


def test_without_memory_pages_go_to_disk():
    (save,) = evict(OffloadIndex(0, 2), b"a")
    assert (save.tier, save.spill) == (Tier.DISK, None)


def test_without_disk_what_memory_has_no_room_for_is_gone():
    index = index_with(1, 0, b"a", b"b")
    assert [index.find(key) for key in (b"a", b"b")] == [None, Tier.MEMORY]


def test_a_page_that_is_saved_already_is_not_saved_again_and_becomes_the_youngest():
    index = index_with(2, 0, b"a", b"b")
    assert evict(index, b"a") == ()
    evict(index, b"c")
    assert [index.find(key) for key in (b"a", b"b")] == [Tier.MEMORY, None]


def test_a_page_that_is_on_disk_is_not_written_there_again():
    index = index_with(1, 2, b"a", b"b")
    saves = evict(index, b"a")
    assert saves == (PageSave(PageRef(0, 0), Tier.MEMORY, 0, b"a", Spill(1, b"b")),)
    assert evict(index, b"b")[0].spill is None


def test_a_slot_that_a_step_under_way_uses_is_not_given_to_another_page():
    index = index_with(1, 0, b"a")
    index.hold(b"a")
    assert evict(index, b"b", settle=False) == ()
    assert index.is_busy(b"a")


@pytest.mark.parametrize("memory", [0, 1], ids=["straight to disk", "through memory"])
def test_a_disk_that_takes_no_page_is_left_alone_for_a_while_and_warned_of_once(memory, caplog):
    now = [0.0]
    index = OffloadIndex(memory, 4, lambda: now[0])
    keys = (bytes([number]) for number in range(99))

    def to_disk(taken):
        """Whether the next eviction is saved to disk; the disk takes it, or does not."""
        key = next(keys)
        saves = evict(index, key, settle=False)
        index.settle(saves, (), (), () if taken else range(len(saves)))
        return any(save.tier is Tier.DISK or save.spill for save in saves)

    for _ in range(memory):
        to_disk(taken=True)
    assert to_disk(taken=True)
    for round_ in range(3):
        now[0] += 100
        assert to_disk(taken=False)
        assert not to_disk(taken=True)  # it rests
        assert len(caplog.records) == 1, round_
    now[0] += 100
    assert to_disk(taken=True) and to_disk(taken=True)
    assert len([key for key in map(bytes, ([n] for n in range(99))) if index.find(key) is Tier.DISK]) == 3
    assert to_disk(taken=False)
    assert len(caplog.records) == 2


def test_what_is_not_known_yet_counts_as_free():
    assert LoadRates().pays(Tier.DISK, 16)
    assert LoadRates(token=1e-3).pays(Tier.DISK, 16)


@pytest.mark.parametrize(("seconds", "pays"), [(0.015, True), (0.017, False)])
def test_a_page_is_loaded_if_that_is_faster_than_computing_its_tokens(seconds, pays):
    assert LoadRates(1e-3, {Tier.DISK: seconds}).pays(Tier.DISK, 16) == pays


def test_one_slow_load_does_not_forbid_loading_for_ever():
    rates = LoadRates().computed(2048, 2.0).loaded(Tier.DISK, 10, 1.0)
    assert not rates.pays(Tier.DISK, 16)
    for _ in range(1000):
        rates = rates.computed(2048, 2.0)
    assert rates.pays(Tier.DISK, 16)


def test_only_steps_that_did_one_thing_teach_what_it_costs():
    index = index_with(4, 0, b"a")
    load = PageLoad(PageRef(0, 1), Tier.MEMORY, 0, b"a")
    for prefilled, decoded in ((8, 0), (0, 3)):
        index.took([load], prefilled, decoded, 1.0)
    index.took([], 2, 9, 1.0)
    assert index.rates == LoadRates()
    index.took([load], 0, 0, 0.5)
    index.took([], 10, 1, 1.0)
    assert index.rates.token == 0.1
    assert index.rates.page[Tier.MEMORY] == pytest.approx(0.5, rel=0.01)


def test_offload_needs_the_prefix_cache():
    with pytest.raises(ConfigError, match=r"enable_prefix_caching=False: offload needs the prefix"):
        CacheConfig(enable_prefix_caching=False, offload=OffloadConfig(memory_bytes=1))


@pytest.mark.parametrize("executor", ["ray", "external"])
def test_pages_on_one_machine_are_not_promised_to_ranks_on_others(executor):
    with pytest.raises(ConfigError, match=r"cannot reach offloaded pages; use processes"):
        EngineConfig("m", executor=executor, cache=CacheConfig(offload=OffloadConfig(memory_bytes=1 << 20)))
