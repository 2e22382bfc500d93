"""Kernels that draw tokens are used only where they give the tokens of plain operations."""

from __future__ import annotations

import logging

import pytest
import torch

from longspan.engine.rank.sampling.gumbel import draw_plainly
from longspan.engine.rank.sampling.trial import tried

CPU = torch.device("cpu")


def right(logits, parameters, positions):
    return draw_plainly(logits, parameters, positions).clone()


def one_token_off(logits, parameters, positions):
    found = draw_plainly(logits, parameters, positions)
    found[0, -1] += 1
    return found


def not_compiled(logits, parameters, positions):
    raise RuntimeError("no such instruction")


def test_a_draw_with_the_tokens_of_plain_operations_is_used():
    assert tried(right, draw_plainly, CPU) is right


@pytest.mark.parametrize(("draw", "reason"), [(one_token_off, "other tokens"), (not_compiled, "no such instruction")])
def test_another_one_is_not_used_and_the_log_says_why(draw, reason, caplog):
    with caplog.at_level(logging.WARNING):
        assert tried(draw, draw_plainly, CPU) is draw_plainly
    assert reason in caplog.text and "sampling is slower" in caplog.text


def test_the_trial_passes_for_the_kernels():
    kernels = pytest.importorskip("longspan.engine.rank.sampling.kernels")
    assert tried(kernels.draw, draw_plainly, CPU) is kernels.draw
