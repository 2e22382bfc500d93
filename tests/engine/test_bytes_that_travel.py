"""What the collectives count is what the formulas of the schedules say, to the byte."""

import pytest
import torch

from longspan import SamplingParams
from longspan.attention.cost import StepTotals
from longspan.attention.workload import WorkloadTotals
from longspan.config import CostConstants
from tests.engine.test_every_layout_gives_the_same_tokens import tokens_of
from tests.oracle import prompt_of
from tests.traffic import KEY_SCHEDULES, QUERY_SCHEDULES

GRIDS = [(1, 2, 1), (1, 3, 1), (2, 1, 2), (4, 2, 2), (2, 3, 1)]
MODELS = ["llama", "llama-multi-query", "deepseek-v3"]
CONTEXT = 50


def schedules_on_grids(schedules):
    """The first schedule on every grid, the others on two."""
    return [(schedule, grid) for schedule in schedules for grid in (GRIDS if schedule == schedules[0] else GRIDS[1::2])]


def decode_step(llm, schedule: str) -> tuple[int, int]:
    """Bytes of one decode step of one request whose context is spread over all shards: as counted, by the formula."""
    executor, setup = llm.engine.executor, llm.engine.setup
    grid, plans = setup.grid, []
    submit = executor.submit
    executor.submit = lambda plan: (plans.append(plan), submit(plan))
    llm.engine.add_request("a", prompt_of(CONTEXT), SamplingParams(temperature=0, max_tokens=8))
    while llm.engine.progress("a")[0] < CONTEXT:
        llm.engine.step()
    before = llm.stats().traffic.bytes_by_label.get(schedule, 0)
    llm.engine.step()
    counted = llm.stats().traffic.bytes_by_label.get(schedule, 0) - before
    (row,) = plans[-1].segments
    table = executor.runners[0]._mirror.table(row.request_id)
    needed = tuple(table.visible(shard, row.stop) for shard in range(grid.num_shards))
    totals = WorkloadTotals(tuple(int(pcp == row.pcp) for pcp in range(grid.pcp)), needed, (), ())
    a_layer = setup.schedules[schedule].bytes(StepTotals(setup.cost_model(CostConstants()), totals))
    return counted, setup.model.num_layers * grid.head_shards * a_layer


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("schedule", "grid"), schedules_on_grids(QUERY_SCHEDULES), ids=str)
def test_queries_are_sent_and_states_come_back(tiny, grid, model, schedule):
    tp, pcp, dcp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, schedule=schedule, ranks_per_node=2)
    counted, by_formula = decode_step(llm, schedule)
    assert counted == by_formula > 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("schedule", "grid"), schedules_on_grids(KEY_SCHEDULES), ids=str)
def test_keys_to_all_others_or_to_those_with_rows(tiny, grid, model, schedule):
    tp, pcp, dcp = grid
    llm = tiny(model, tp=tp, pcp=pcp, dcp=dcp, schedule=schedule)
    counted, by_formula = decode_step(llm, schedule)
    assert counted == by_formula > 0


def test_between_machines_a_tree_sends_one_state_for_each_machine(tiny):
    crossing = {}
    for schedule in ("gather_q", "tree_q"):
        llm = tiny(pcp=4, schedule=schedule, ranks_per_node=2)
        executor = llm.engine.executor
        outside = []
        send = executor._fabric.send

        def counted(source, target, tensor, send=send, outside=outside):
            if source // 2 != target // 2 and tensor.dtype == torch.float32:
                outside.append(tensor.numel() * 4)
            send(source, target, tensor)

        executor._fabric.send = counted
        tokens_of(llm, [prompt_of(CONTEXT)], 4)
        crossing[schedule] = sum(outside)
    assert crossing["tree_q"] < 0.7 * crossing["gather_q"]
