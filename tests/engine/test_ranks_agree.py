"""In debug mode ranks compare what they are about to do."""

from dataclasses import replace

import pytest

from longspan import SamplingParams
from longspan.errors import EngineError
from tests.oracle import prompt_of


@pytest.mark.parametrize("grid", [{"pcp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_rank_with_another_plan_is_noticed_before_it_follows_it(tiny, grid, monkeypatch):
    llm = tiny("llama-deep", **grid)
    last = llm.engine.executor.runners[-1]
    start = last.start
    monkeypatch.setattr(last, "start", lambda plan: start(replace(plan, step=plan.step + 1)))
    with pytest.raises(EngineError, match="has another plan"):
        llm.generate([prompt_of(20)], SamplingParams(temperature=0, max_tokens=2))
