"""What the collectives count is what the formulas of the schedules say, to the byte."""

import pytest

from longspan import SamplingParams
from longspan.attention.facts import gather_kv_bytes, gather_q_bytes
from tests.oracle import prompt_of

GRIDS = [(1, 2, 1), (1, 3, 1), (2, 1, 2), (4, 2, 2), (2, 3, 1)]
MODELS = ["llama", "llama-multi-query", "deepseek-v3"]
CONTEXT = 50


def decode_step_bytes(llm, schedule: str) -> int:
    """Bytes of one decode step of one request whose context is spread over all shards."""
    llm.engine.add_request("a", prompt_of(CONTEXT), SamplingParams(temperature=0, max_tokens=8))
    while llm.engine.progress("a")[0] < CONTEXT:
        llm.engine.step()
    before = llm.stats().traffic.bytes_by_label.get(schedule, 0)
    llm.engine.step()
    return llm.stats().traffic.bytes_by_label[schedule] - before


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_queries_out_and_partials_back(tiny, grid, model):
    tp, pcp, dcp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, schedule="gather_q")
    setup = llm.engine.setup
    a_layer = gather_q_bytes(setup.attention_shape, [1] + [0] * (pcp - 1), dcp)
    groups = tp // dcp
    assert decode_step_bytes(llm, "gather_q") == setup.model.num_layers * groups * a_layer


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_keys_to_all_others(tiny, grid, model):
    tp, pcp, dcp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, schedule="gather_kv")
    setup = llm.engine.setup
    a_layer = gather_kv_bytes(setup.attention_shape, CONTEXT + 1, pcp * dcp)
    groups = tp // dcp
    assert decode_step_bytes(llm, "gather_kv") == setup.model.num_layers * groups * a_layer
