"""What a rank knows of the scheduler's requests, from plans alone."""

from longspan.cache.pages import PageRef
from longspan.plan.mirror import UNKNOWN, Mirror
from longspan.plan.plan import Admission, NewPages, Segment, StepPlan
from longspan.plan.reach import Place
from longspan.plan.view import rank_view
from longspan.request import SamplingParams

PENALISED = SamplingParams(repetition_penalty=1.5)
A, B, C = PageRef(0, 3), PageRef(1, 0), PageRef(0, 4)


def plan(finished=(), admitted=(), new_pages=(), segments=()):
    return StepPlan(1, (), (), finished, admitted, new_pages, segments, ("local",), ("local",))


def admission(request_id, pages=(), history=(), params=PENALISED):
    return Admission(request_id, 3, 5, params, pages, history)


def segment(request_id, start, *token_ids, prefill=False):
    return Segment(request_id, start, token_ids, 0, prefill, 0, 1)


def mirror_of(*plans):
    mirror = Mirror(page_size=2, num_shards=2)
    for each in plans:
        mirror.apply(each)
    return mirror


def test_a_table_is_the_pages_of_the_admission_and_those_that_came_later_in_order():
    first = plan(admitted=(admission("0", (A,)),), new_pages=(NewPages("0", (B,)),))
    mirror = mirror_of(first, plan(new_pages=(NewPages("0", (C,)),)))
    assert mirror.table("0").pages == [A, B, C]


def test_a_request_that_has_ended_is_forgotten_and_others_are_not():
    mirror = mirror_of(plan(admitted=(admission("0"), admission("1"))), plan(finished=("0",)))
    assert list(mirror.requests) == ["1"]


def test_a_request_that_is_preempted_and_admitted_again_in_one_plan_starts_from_its_new_pages():
    first = plan(admitted=(admission("0", (A,)),))
    mirror = mirror_of(first, plan(finished=("0",), admitted=(admission("0", (B,)),), new_pages=(NewPages("0", (C,)),)))
    assert mirror.table("0").pages == [B, C]


def test_tokens_are_remembered_behind_the_history_of_an_admission():
    mirror = mirror_of(
        plan(admitted=(admission("0", history=(7, 8, 9)),), segments=(segment("0", 0, 7, 8, 9, prefill=True),)),
        plan(segments=(segment("0", 3, 10),)),
    )
    assert mirror.requests["0"].history == [7, 8, 9, 10]
    assert mirror.requests["0"].output(1) == [10]


def test_a_request_that_enters_with_output_keeps_it_while_its_first_tokens_are_computed_again():
    mirror = mirror_of(
        plan(admitted=(admission("0", history=(7, 8, 9, 10)),), segments=(segment("0", 0, 7, 8, prefill=True),))
    )
    assert mirror.requests["0"].history == [7, 8, 9, 10]


def test_drafts_that_proved_wrong_are_replaced():
    mirror = mirror_of(
        plan(admitted=(admission("0", history=(7, 8, 9)),), segments=(segment("0", 3, 10, 11, 12),)),
        plan(segments=(segment("0", 4, 13),)),
    )
    assert mirror.requests["0"].output(9) == [10, 13]


def test_rows_of_a_step_know_how_many_drafts_are_before_them_in_whichever_segment_these_are():
    first = plan(
        admitted=(admission("0", (A, B, C, C)),),
        segments=(segment("0", 0, 7, 8, prefill=True), segment("0", 2, 9, prefill=True)),
    )
    mirror = mirror_of(first)
    assert drafts_of(first, mirror) == [0, 0]
    verify = plan(segments=(sampled("0", 3, 10, 11), sampled("0", 5, 12, 13)))
    mirror.apply(verify)
    assert drafts_of(verify, mirror) == [0, 1, 2, 3]
    assert drafts_of(plan(segments=(sampled("0", 7, 14),)), mirror) == [0]


def sampled(request_id, start, *token_ids):
    return Segment(request_id, start, token_ids, 0, False, 0, len(token_ids))


def drafts_of(step, mirror):
    view = rank_view(step, mirror.requests, Place(0, 0, ((0, 1),)), (None,), {"local": None})
    return [wanted.drafts for wanted in view.samples]


def test_tokens_behind_one_that_nobody_read_are_not_taken_for_their_predecessors():
    mirror = mirror_of(plan(admitted=(admission("0", history=(7, 8, 9)),)), plan(segments=(segment("0", 4, 11),)))
    assert mirror.requests["0"].history == [7, 8, 9, UNKNOWN, 11]


def test_without_a_history_nothing_is_remembered():
    mirror = mirror_of(plan(admitted=(admission("0"),), segments=(segment("0", 0, 7, 8, 9, prefill=True),)))
    assert mirror.requests["0"].history == []
