"""What ranks answer to a plan, and what of it counts."""

from dataclasses import replace

from longspan.plan.result import StepResult
from longspan.request import PromptScore, SampledToken, TokenLogprobs
from tests.unit.test_scheduler import Rig

LIKELY = TokenLogprobs(-0.1, (), ())


def everything(request_id):
    """One of each that a request can be given."""
    return StepResult(
        (SampledToken(request_id, 4),), (PromptScore(request_id, 1, LIKELY),), {request_id: "broken"}, (2,), (3,)
    )


def test_what_ranks_hand_over_is_one_result():
    joined = StepResult.joined([everything("a"), StepResult(), everything("b")])
    assert [token.request_id for token in joined.tokens] == ["a", "b"]
    assert [score.request_id for score in joined.prompt_scores] == ["a", "b"]
    assert joined.errors == {"a": "broken", "b": "broken"}
    assert joined.failed_loads == (2, 2)
    assert joined.failed_saves == (3, 3)


def committed(ended):
    """What counts of a step that computes one request, which may have ended before it is committed."""
    rig = Rig()
    rig.add("a", [1] * 8)
    plan = rig.scheduler.schedule()
    if ended:
        rig.scheduler.finish("a")
    return rig.scheduler.commit(plan, everything("a"))


def test_what_a_request_is_given_counts_while_it_goes_on():
    assert committed(ended=False) == replace(everything("a"), failed_loads=(), failed_saves=())


def test_nothing_that_a_request_is_given_counts_once_it_has_ended():
    assert committed(ended=True) == StepResult()


def test_a_request_that_cannot_go_on_gets_no_token():
    rig = Rig()
    rig.add("a", [1] * 8)
    counted = rig.scheduler.commit(rig.scheduler.schedule(), StepResult(errors={"a": "broken"}))
    assert counted == StepResult(errors={"a": "broken"})
    assert len(rig.scheduler.running[0].tokens) == 8
