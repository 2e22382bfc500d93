"""What ranks answer to a plan, and what of it counts."""

from dataclasses import replace

import pytest

from longspan.cache.pages import PageTable
from longspan.plan.result import StepResult
from longspan.request import CoreRequest, PromptScore, SampledToken, SamplingParams, TokenLogprobs
from longspan.scheduler.progress import Progress
from longspan.scheduler.sequence import SequenceState
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


@pytest.mark.parametrize("pending", [0, 1, 2])
@pytest.mark.parametrize("sampled", [(), (SampledToken("a", 5, None, 0),)], ids=["no token", "a token"])
def test_a_token_behind_which_nothing_is_drafted_is_taken_as_one_beside_drafts_of_others(sampled, pending):
    states = []
    for drafts in ({}, {("b", 0): (3,)}):
        sequence = SequenceState(CoreRequest("a", [1, 2, 3], SamplingParams(), 0, 8), PageTable(4, 1))
        sequence.computed, sequence.in_flight, sequence.pending = 3, 1, pending
        taken = sequence.take(Progress(True, 3, 0, ()), sampled, drafts)
        states.append((taken, sequence.tokens, sequence.computed, sequence.pending, sequence.in_flight))
        assert sequence.expected == ()
    assert states[0] == states[1]
