"""Kernels that draw tokens are used only where they give the tokens of plain operations."""

from __future__ import annotations

import logging

import pytest
import torch

from longspan.engine.rank import build
from longspan.engine.rank.sampling.gumbel import draw_plainly
from longspan.engine.rank.sampling.trial import tried

CPU = torch.device("cpu")


def right(logits, parameters, positions):
    return draw_plainly(logits, parameters, positions).clone()


def off_by_a_token(where):
    """A draw whose last token is wrong, where this is so of the parameters."""

    def draw(logits, parameters, positions):
        found = draw_plainly(logits, parameters, positions)
        found[0, -1] += where(parameters)
        return found

    return draw


with_filters = off_by_a_token(lambda parameters: parameters is not None and parameters.filters)
without_filters = off_by_a_token(lambda parameters: parameters is not None and not parameters.filters)
greedy = off_by_a_token(lambda parameters: parameters is None)


def not_compiled(logits, parameters, positions):
    raise RuntimeError("no such instruction")


def test_a_draw_with_the_tokens_of_plain_operations_is_used():
    assert tried(right, draw_plainly, CPU) is right


@pytest.mark.parametrize("draw", [with_filters, without_filters, greedy, not_compiled])
def test_another_one_is_not_used_and_the_log_says_why(draw, caplog):
    reason = "no such instruction" if draw is not_compiled else "other tokens"
    with caplog.at_level(logging.WARNING):
        assert tried(draw, draw_plainly, CPU) is draw_plainly
    assert reason in caplog.text and "sampling is slower" in caplog.text


def test_the_trial_passes_for_the_kernels():
    kernels = pytest.importorskip("longspan.engine.rank.sampling.kernels")
    assert tried(kernels.draw, draw_plainly, CPU) is kernels.draw


class WithAnother:
    """A group of two, of which the other member reports a number."""

    size = 2

    def __init__(self, number):
        self.number, self.told = number, []

    def all_gather(self, mine, counts, label):
        self.told.append(int(mine))
        return [mine, torch.tensor([self.number])]


@pytest.mark.parametrize(
    ("mine", "other", "agreed"), [(right, 1, right), (right, 0, draw_plainly), (draw_plainly, 1, draw_plainly)]
)
def test_kernels_that_one_rank_cannot_use_are_used_on_none(mine, other, agreed, monkeypatch):
    monkeypatch.setattr(build, "batch_draw", lambda device_type: mine)
    group = WithAnother(other)
    assert build.agreed_draw([group], CPU) is agreed
    assert group.told == [mine is right]
