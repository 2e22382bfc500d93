"""The scheduler's promises: every token computed once, on the rank of its page; nobody starves; nothing leaks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import AttentionShape, GroupShape
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import root_key
from longspan.config import ParallelConfig, SchedulerConfig
from longspan.errors import ContextOverflow, RequestError
from longspan.parallel.grid import Grid
from longspan.plan.mirror import Mirror
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.request import CoreRequest, SampledToken, SamplingParams
from longspan.scheduler.limits import Limits
from longspan.scheduler.scheduler import Scheduler


class Rig:
    """A scheduler whose model returns made-up tokens, checking every plan against a dense account of KV."""

    def __init__(self, tp=1, pcp=1, dcp=1, pages=(64,), page_size=4, prefix_caching=True, **options):
        self.grid = Grid(ParallelConfig(tp, pcp, dcp))
        pages = pages * self.grid.num_shards if len(pages) == 1 else pages
        self.cache = CacheManager(page_size, pages, prefix_caching)
        config = SchedulerConfig(**{"max_num_batched_tokens": 32, "max_num_seqs": 16, "local_context": 0, **options})
        group = GroupShape(self.grid.shards_of_pcp, self.grid.nodes(self.grid.context_group(0)))
        chooser = ScheduleChooser(CostModel(AttentionShape(4, 2, 8, 4), group, SCHEDULES), config.schedule)
        self.scheduler = Scheduler(config, self.cache, self.grid, chooser, root_key("test"))
        self.limits = Limits.of(10_000, config.schedule, pages, page_size)
        self.left: dict[str, int] = {}
        self.stored: dict[tuple[int, int, int], tuple[int, ...]] = {}  # (shard, page, row) -> tokens up to there
        self.mirror = Mirror(page_size, self.grid.num_shards)
        self.tokens: dict[str, list[int]] = {}
        self.plans: list[StepPlan] = []

    def add(self, request_id, prompt, max_tokens=4, priority=0, parent_id=""):
        params = SamplingParams(max_tokens=max_tokens, priority=priority)
        max_tokens = self.limits.check(len(prompt), params)
        self.scheduler.add(CoreRequest(request_id, prompt, params, 0, max_tokens, parent_id=parent_id))
        self.left[request_id] = max_tokens
        self.tokens[request_id] = list(prompt)

    def step(self):
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        assert StepPlan.decode(plan.encode()) == plan
        self.plans.append(plan)
        self._account(plan)
        sampled = tuple(SampledToken(s.request_id, 1000 + s.stop) for s in plan.segments if s.sample)  # no two alike
        self.scheduler.commit(plan, StepResult(sampled))
        for token in sampled:
            self.tokens[token.request_id].append(token.token_id)
            self.left[token.request_id] -= 1
            if not self.left[token.request_id]:
                self.scheduler.finish(token.request_id)
        self.scheduler.check_integrity()
        return plan

    def run(self, limit=2000):
        for _ in range(limit):
            if self.step() is None:
                return
        raise AssertionError("the scheduler does not come to an end")

    def _account(self, plan):
        """Every token's KV goes to exactly one shard, written by its ranks, and every earlier one is there."""
        self.mirror.apply(plan)
        size = self.cache.page_size
        assert sum(s.length for s in plan.segments) <= self.scheduler.config.max_num_batched_tokens
        for segment in plan.segments:
            tokens, table = self.tokens[segment.request_id], self.mirror.table(segment.request_id)
            assert segment.token_ids == tuple(tokens[segment.start : segment.stop])
            for position in range(segment.start, segment.stop):
                page = table.pages[position // size]
                assert self.grid.pcp_of_shard[page.shard] == segment.pcp
                self.stored[(*page, position % size)] = tuple(tokens[: position + 1])
        for segment in plan.segments:
            tokens, table = self.tokens[segment.request_id], self.mirror.table(segment.request_id)
            for position in range(segment.stop):
                page = table.pages[position // size]
                assert self.stored[(*page, position % size)] == tuple(tokens[: position + 1]), "stale or foreign KV"


@st.composite
def loads(draw):
    pcp, dcp = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    page_size = draw(st.sampled_from([1, 3, 8]))
    shards = pcp * dcp
    pages = tuple(draw(st.lists(st.integers(20, 40), min_size=shards, max_size=shards)))
    rig = Rig(
        dcp, pcp, dcp, pages, page_size,
        max_num_batched_tokens=draw(st.sampled_from([5, 16, 64])), max_num_seqs=5,
        local_context=draw(st.sampled_from([0, 12])),
    )  # fmt: skip
    most = sum(pages) * page_size
    for request_id in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, min(60, most - 12)))
        prompt = [1] * draw(st.integers(0, length)) + [request_id] * length
        rig.add(str(request_id), prompt[:length], draw(st.integers(1, 12)), parent_id=draw(st.sampled_from("abc")))
    return rig


@given(loads())
@settings(max_examples=150, deadline=None)
def test_any_load_ends_with_every_token_computed_where_its_page_is_and_nothing_lost(rig):
    rig.run()
    assert not any(rig.left.values())
    assert all(rig.cache.used(shard) == 0 for shard in range(rig.cache.num_shards))


def test_a_request_that_can_never_fit_is_refused_at_once_with_the_numbers():
    rig = Rig(pages=(10,), page_size=4)
    with pytest.raises(ContextOverflow, match=r"39 prompt tokens and max_tokens=3 exceed the 41 tokens"):
        rig.add("0", [1] * 39, max_tokens=3)
    rig.add("0", [1] * 39, max_tokens=2)
    rig.run()


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match=r"prompt=.*is empty"):
        Rig().add("0", [])


def test_decodes_go_on_while_a_long_prompt_is_prefilled():
    rig = Rig(pages=(500,))
    rig.add("0", [1] * 8, max_tokens=50)
    rig.step()
    rig.add("1", [2] * 400, max_tokens=2)
    for _ in range(10):
        plan = rig.step()
        assert "0" in [s.request_id for s in plan.segments if not s.prefill]
        assert "1" in [s.request_id for s in plan.segments if s.prefill]


def test_a_short_prompt_behind_a_long_one_gets_its_first_token_in_the_next_step():
    rig = Rig(pages=(500,))
    rig.add("0", [1] * 400)
    rig.step()
    rig.add("1", [2] * 400)
    rig.add("2", [3] * 10)
    plan = rig.step()
    assert [s.request_id for s in plan.segments if s.sample] == ["2"]
    assert "0" in [s.request_id for s in plan.segments], "and the long one goes on"


def test_a_long_prompt_is_not_starved_by_short_ones():
    rig = Rig(pages=(500,), prefix_caching=False)
    rig.add("0", [1] * 320, max_tokens=1)
    rig.step()
    for step in range(30):
        rig.add(str(100 + step), [2] * 16, max_tokens=1)
        rig.step()
        if not rig.left["0"]:
            break
    assert step < 20, "half of every budget is the long prompt's"


def test_a_preempted_long_prefill_comes_back_and_finishes():
    rig = Rig(pages=(12,), page_size=4, max_num_batched_tokens=8, max_num_seqs=4, prefix_caching=False)
    rig.add("0", [1] * 8, max_tokens=30)
    rig.step()
    rig.add("1", [2] * 30, max_tokens=10)
    rig.run()
    assert rig.scheduler.preemptions > 0
    assert not any(rig.left.values())


def test_a_preempted_decode_goes_on_behind_the_tokens_it_had():
    rig = Rig(pages=(9,), page_size=2, prefix_caching=False)
    for request_id in range(3):
        rig.add(str(request_id), [request_id] * 3, max_tokens=9)
    rig.run()
    again = [a for plan in rig.plans for a in plan.admitted]
    assert rig.scheduler.preemptions > 0 and len(again) == 3 + rig.scheduler.preemptions
    assert not any(rig.left.values())


def test_a_prompt_for_a_peer_that_is_preempted_while_its_last_step_is_in_flight_is_computed_again():
    """Its token would end it, and the peer would fetch pages that others have."""
    scheduler = Rig(pages=(4,), page_size=2, prefix_caching=False, async_scheduling=True).scheduler
    scheduler.add(CoreRequest("own", [1] * 3, SamplingParams(), 0, 4))
    scheduler.commit(scheduler.schedule(), StepResult((SampledToken("own", 5),)))
    scheduler.add(CoreRequest("peer", [2] * 3, SamplingParams(max_tokens=1), 0, 1, for_peer=True))
    second, third = scheduler.schedule(), scheduler.schedule()
    assert {segment.request_id for segment in second.segments} == {"own", "peer"}
    assert scheduler.preemptions == 1 and "peer" in third.finished
    both = StepResult((SampledToken("own", 6, position=1), SampledToken("peer", 7)))
    assert [token.request_id for token in scheduler.commit(second, both).tokens] == ["own"]
    scheduler.finish("own")
    (again,) = scheduler.schedule().admitted
    assert again.request_id == "peer"


def test_a_half_full_page_is_not_found_by_others_and_a_page_that_two_steps_filled_is():
    rig = Rig(page_size=4, max_num_batched_tokens=6, max_num_seqs=4)
    for steps, found in ((1, 4), (2, 12)):
        rig.add(str(steps), [steps] * 23, max_tokens=1)
        for _ in range(steps):
            rig.step()
        rig.scheduler.finish(str(steps))
        rig.add(str(10 + steps), [steps] * 23, max_tokens=1)
        assert rig.step().segments[0].start == found
        rig.run()


def test_a_page_whose_last_token_is_sampled_and_not_computed_is_not_found():
    rig = Rig(page_size=4)
    rig.add("0", [7] * 6, max_tokens=9)
    for _ in range(2):
        rig.step()
    assert len(rig.tokens["0"]) == 8
    rig.scheduler.finish("0")
    rig.add("1", [*rig.tokens["0"], 5], max_tokens=1)
    assert rig.step().segments[0].start == 4


def test_aborting_a_waiting_and_a_running_request_frees_their_pages():
    rig = Rig(max_num_seqs=1)
    rig.add("0", [1] * 20)
    rig.add("1", [2] * 20)
    rig.step()
    rig.scheduler.finish("0")
    rig.scheduler.finish("1")
    rig.scheduler.check_integrity()
    assert rig.scheduler.schedule() is None
    assert rig.cache.used(0) == 0


def test_one_of_two_requests_that_share_pages_is_aborted():
    rig = Rig(pages=(64,))
    rig.add("0", [1] * 16, max_tokens=3)
    rig.run()
    rig.add("1", [1] * 16 + [2] * 4, max_tokens=8)
    rig.add("2", [1] * 16 + [3] * 4, max_tokens=8)
    rig.step()
    rig.scheduler.finish("1")
    rig.left["1"] = 0
    rig.run()
    assert rig.left["2"] == 0


@pytest.mark.parametrize("length, hit", [(8, 4), (9, 8), (12, 8), (5, 4), (4, 0)])
def test_a_prefix_hit_leaves_at_least_one_token_to_compute(length, hit):
    rig = Rig(page_size=4)
    rig.add("0", [1] * 30, max_tokens=1)
    rig.run()
    rig.add("1", [1] * length, max_tokens=1)
    plan = rig.step()
    assert plan.segments[0].start == hit


def test_decode_rows_spread_over_the_context_ranks():
    rig = Rig(pcp=2, pages=(100,), local_context=0, max_num_batched_tokens=64)
    for request_id in range(8):
        rig.add(str(request_id), [request_id] * 4, max_tokens=20)
    for _ in range(10):
        plan = rig.step()
    rows = [s.pcp for s in plan.segments]
    assert sorted(rows) == [0] * 4 + [1] * 4


def test_a_plan_holds_new_pages_only_whatever_the_context_length():
    rig = Rig(pages=(800,), page_size=4, max_num_batched_tokens=2048, max_num_seqs=4)
    rig.add("0", [1] * 40, max_tokens=8)
    rig.run()
    short = max(len(plan.encode()) for plan in rig.plans[1:])
    rig.plans.clear()
    rig.add("1", [2] * 2000, max_tokens=8)
    rig.run()
    assert max(len(plan.encode()) for plan in rig.plans[1:]) <= short + 16


def test_with_schedule_local_every_request_stays_on_one_shard():
    rig = Rig(pcp=2, pages=(10,), schedule="local")
    for request_id in range(4):
        rig.add(str(request_id), [request_id] * 20, max_tokens=8)
    rig.run()
    assert not any(segment.num_remote_groups for plan in rig.plans for segment in plan.segments)
    with pytest.raises(ContextOverflow, match="41 tokens"):
        rig.add("9", [1] * 41, max_tokens=1)


@pytest.mark.parametrize(("policy", "order"), [("priority", ["c", "a", "d", "b"]), ("fcfs", ["a", "b", "c", "d"])])
def test_requests_of_a_lower_priority_number_start_first_and_equal_ones_in_order(policy, order):
    rig = Rig(scheduling_policy=policy, max_num_seqs=1)
    for request_id, priority in (("a", 1), ("b", 2), ("c", -1), ("d", 1)):
        rig.add(request_id, [1] * 4, max_tokens=2, priority=priority)
    rig.run()
    assert [admission.request_id for plan in rig.plans for admission in plan.admitted] == order


@pytest.mark.parametrize(("policy", "first"), [("priority", "a"), ("fcfs", "b")])
def test_without_pages_the_request_of_the_highest_number_is_preempted_and_comes_back(policy, first):
    rig = Rig(pages=(8,), page_size=4, scheduling_policy=policy, prefix_caching=False)
    rig.add("a", [1] * 12, max_tokens=12, priority=5)
    rig.step()  # it runs before the other comes
    rig.add("b", [2] * 12, max_tokens=12, priority=1)
    rig.run()
    again = [admission.request_id for plan in rig.plans for admission in plan.admitted][2:]
    assert again[0] == first
    assert rig.scheduler.preemptions > 0
    assert not any(rig.left.values())


def choices(rig, request_id, count, max_tokens):
    for number in range(count):
        rig.add(f"{request_id}.{number}", [ord(request_id)] * 3, max_tokens, parent_id=request_id)


def test_the_completions_of_one_request_do_not_keep_another_request_from_starting():
    rig = Rig(max_num_seqs=8)
    choices(rig, "a", 4, 30)
    choices(rig, "b", 9, 30)
    rig.step()
    assert len(rig.scheduler.running) == 8 and len(rig.scheduler.waiting) == 5
    rig.add("bystander", [1] * 3, max_tokens=2)
    plan = rig.step()
    assert "bystander" in [segment.request_id for segment in plan.segments if segment.sample]
    assert rig.scheduler.preemptions == 1
    assert len([each for each in rig.scheduler.running if each.parent_id == "a"]) == 4, "b's were as many, and younger"
    rig.run()
    assert not any(rig.left.values())


def test_the_pages_of_one_requests_completions_do_not_keep_another_request_from_starting():
    rig = Rig(pages=(20,), prefix_caching=False)
    choices(rig, "a", 8, 40)
    for _ in range(8):
        rig.step()
    rig.add("bystander", [1] * 7, max_tokens=9)
    for _ in range(16):
        rig.step()
    assert not rig.left["bystander"]
    assert all(rig.left[f"a.{number}"] for number in range(8))
    rig.run()
    assert not any(rig.left.values())


def test_completions_take_turns_with_requests_that_come_later_and_none_waits_for_ever():
    rig = Rig(max_num_seqs=2)
    choices(rig, "a", 6, 3)
    for step in range(60):
        rig.add(str(step), [2] * 3, max_tokens=3)
        rig.step()
        if not any(rig.left[f"a.{number}"] for number in range(6)):
            break
    started = [each.request_id for plan in rig.plans for each in plan.admitted]
    assert not any(rig.left[f"a.{number}"] for number in range(6))
    assert len([each for each in dict.fromkeys(started) if not each.startswith("a.")]) >= 5


def test_of_two_free_places_one_is_for_the_request_that_came_after_many_completions():
    rig = Rig(max_num_seqs=2)
    choices(rig, "a", 6, 2)
    rig.step()
    rig.step()
    rig.add("later", [2] * 3)
    assert [each.request_id for each in rig.step().admitted] == ["a.2", "later"]


def test_requests_of_one_completion_are_not_preempted_for_later_ones():
    rig = Rig(max_num_seqs=2)
    for number in range(4):
        rig.add(str(number), [number] * 3, max_tokens=6)
    rig.run()
    assert rig.scheduler.preemptions == 0
    assert [each.request_id for plan in rig.plans for each in plan.admitted] == ["0", "1", "2", "3"]


def test_a_more_important_requests_completions_are_not_preempted_for_a_less_important_one():
    rig = Rig(max_num_seqs=2, scheduling_policy="priority")
    for number in range(2):
        rig.add(f"a.{number}", [1] * 3, priority=0, parent_id="a")
    rig.add("later", [2] * 3, priority=1)
    rig.run()
    assert rig.scheduler.preemptions == 0
