"""Tokens of the step before, which only the device knows: every row gets that of its request."""

from __future__ import annotations

import pytest
import torch

from longspan.engine.rank.last_tokens import LastTokens
from longspan.plan.view import PendingRow, RankView


@pytest.mark.parametrize(
    ("known", "pending", "expected"),
    [
        ((0, 0, 0), ((0, "a"), (1, "b"), (2, "c")), [10, 11, 12]),
        ((0, 0, 0), ((0, "c"), (1, "a"), (2, "b")), [12, 10, 11]),
        ((0, 0), ((0, "a"), (1, "b")), [10, 11]),
        ((5, 0, 7, 0), ((1, "c"), (3, "a")), [5, 12, 7, 10]),
        ((5, 6), (), [5, 6]),
    ],
)
def test_a_pending_row_takes_the_token_that_its_request_sampled(known, pending, expected):
    last = LastTokens(torch.device("cpu"))
    last.keep(torch.tensor([10, 11, 12]), "abc")
    view = RankView(known, known, (), (), (), (), tuple(PendingRow(*each) for each in pending))
    assert last.fill(view).tolist() == expected
