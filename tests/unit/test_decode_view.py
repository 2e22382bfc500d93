"""The quick view of a step that only decodes is the view of any step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from msgspec import structs

from longspan.attention.schedules import SCHEDULES
from longspan.cache.pages import PageRef
from longspan.engine.rank.graphs import travelling, uniform
from longspan.plan.decode import decode_view
from longspan.plan.mirror import Mirror
from longspan.plan.plan import Admission, NewPages, Segment, StepPlan
from longspan.plan.reach import Place, Reach
from longspan.plan.view import PhaseView, RankView, rank_view
from longspan.request import SamplingParams

PAGE = 4
SHARDS = {1: ((0,),), 2: ((0,), (1,)), 4: ((0, 1), (2, 3))}
MOVES = {name: schedule.moves for name, schedule in SCHEDULES.items()}


def random_plan(pick: random.Random, shards: tuple[tuple[int, ...], ...], windows: int) -> StepPlan:
    """Requests of all lengths, with pages anywhere, each of which decodes one token."""
    admitted, segments, free = [], [], list(range(500))
    pick.shuffle(free)
    for number in range(pick.randint(1, 9)):
        start = pick.randint(1, 60)
        pages = tuple(PageRef(pick.choice(sum(shards, ())), free.pop()) for _ in range(start // PAGE + 1))
        if pick.random() < 0.5:  # adjacent ones
            pages = tuple(PageRef(page.shard, 1000 * (number + 1) + at) for at, page in enumerate(pages))
        pcp = next(pcp for pcp, held in enumerate(shards) if pages[-1].shard in held)
        remote = len({page.shard for page in pages}) > 1
        name, pending = f"r{number}", pick.random() < 0.5
        admitted.append(Admission(name, pick.randint(1, start), 0, SamplingParams(), pages, ()))
        token = () if pending else (pick.randint(1, 9),)
        segments.append(Segment(name, start, token, pcp, False, windows * remote, 1, pending=pending))
    moving = any(segment.num_remote_groups for segment in segments)
    schedules = ("gather_q" if moving else "local",) * windows
    return StepPlan(1, (), (), (), tuple(admitted), (), tuple(segments), schedules, ("local",) * windows)


def next_plan(pick: random.Random, plan: StepPlan, mirror: Mirror, shards: tuple[tuple[int, ...], ...]) -> StepPlan:
    """The step after a plan: the same requests but one, now and then, each with one more token."""
    gone = pick.choice(plan.segments).request_id if pick.random() < 0.3 and len(plan.segments) > 1 else None
    new, segments = [], []
    for segment in plan.segments:
        if segment.request_id == gone:
            continue
        start, table = segment.start + 1, mirror.table(segment.request_id)
        shard = pick.choice(sum(shards, ())) if start % PAGE == 0 else table.shard_of(start)
        if start % PAGE == 0:
            new.append(
                NewPages(segment.request_id, (PageRef(shard, pick.choice([600 + start, table.pages[-1].index + 1])),))
            )
        held = {shard, *(page.shard for page in table.pages)}
        pcp = next(pcp for pcp, mine in enumerate(shards) if shard in mine)
        remote = len(plan.decode_schedules) * (len(held) > 1)
        segments.append(structs.replace(segment, start=start, pcp=pcp, num_remote_groups=remote))
    moving = any(segment.num_remote_groups for segment in segments)
    return replace(
        plan, admitted=(), finished=(gone,) if gone else (), new_pages=tuple(new), segments=tuple(segments),
        decode_schedules=("gather_q" if moving else "local",) * len(plan.decode_schedules),
    )  # fmt: skip


def in_tuples(view: RankView) -> RankView:
    """A view whose runs can be compared."""

    def plain(reach: Reach) -> Reach:
        blocks = tuple(replace(block, runs=tuple(block.runs)) for block in reach.blocks)
        return replace(reach, own=tuple(reach.own), blocks=blocks)

    def of_phase(phase: PhaseView) -> PhaseView:
        return replace(phase, groups=tuple(map(plain, phase.groups)))

    lists = {name: tuple(getattr(view, name)) for name in ("token_ids", "positions", "writes", "samples", "pending")}
    return replace(view, phases=tuple(map(of_phase, view.phases)), **lists)


@pytest.mark.parametrize("shards", SHARDS.values(), ids=str)
@pytest.mark.parametrize("windows", [(None,), (None, 6)], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_the_quick_view_of_a_decode_step_is_the_view_of_any_step(seed, windows, shards):
    pick = random.Random(seed)
    plan, mirror = random_plan(pick, shards, len(windows)), Mirror(PAGE, 4)
    for _ in range(7):
        mirror.apply(plan)
        for pcp, held in enumerate(shards):
            for shard in held:
                place = Place(pcp, shard, shards)
                quick = decode_view(plan, mirror.requests, place, windows, travelling(plan, SCHEDULES))
                slow = rank_view(uniform(plan, SCHEDULES), mirror.requests, place, windows, MOVES)
                assert in_tuples(quick) == in_tuples(slow)
        plan = next_plan(pick, plan, mirror, shards)
