"""Parameters of requests that are remembered: rows get what they would get alone, whichever were there before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from longspan.engine.rank.sampling import parameters
from longspan.engine.rank.sampling.gumbel import DrawParameters
from longspan.engine.rank.sampling.parameters import ParameterTable
from longspan.request import SamplingParams

CPU = torch.device("cpu")
KINDS = (
    SamplingParams(temperature=0), SamplingParams(temperature=0.5), SamplingParams(top_p=0.9), SamplingParams(top_k=3),
    SamplingParams(min_p=0.1, logprobs=2), SamplingParams(temperature=0, presence_penalty=1.0),
    SamplingParams(temperature=0, top_p=0.5), SamplingParams(logit_bias=((1, 2.0),)),
)  # fmt: skip


@pytest.mark.parametrize("remembered", [1024, 2], ids=["all are remembered", "all but a few are forgotten"])
def test_rows_get_what_they_would_get_alone(remembered, monkeypatch):
    monkeypatch.setattr(parameters, "_FORGET", remembered)
    pick, table = random.Random(0), ParameterTable()
    requests = [(replace(pick.choice(KINDS)), pick.randrange(5)) for _ in range(60)]
    for step in range(40):
        rows = pick.choices(requests[step : step + 20], k=pick.randint(1, 8))  # a request may have several rows
        params, seeds = [one for one, _ in rows], [seed for _, seed in rows]
        found, expected = table.of(params, seeds, CPU), DrawParameters.of(params, seeds, CPU)
        assert (found.draw is None) == all(one.temperature == 0 for one in params)
        if found.draw is not None:
            assert torch.equal(found.draw.table, expected.table)
            assert found.draw.filters == expected.filters
        assert found.changing == {row for row, one in enumerate(params) if one.penalises or one.logit_bias}
        assert found.described == tuple(row for row, one in enumerate(params) if one.logprobs is not None)


def test_rows_that_are_sampled_one_by_one_are_not_sent():
    assert ParameterTable().of([SamplingParams()], [1], None).draw is None
