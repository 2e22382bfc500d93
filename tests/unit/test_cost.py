"""The cost model: its estimates, and what it chooses on this machine, on published ones, and when told to."""

import math
from dataclasses import replace

import pytest

from longspan.attention.calibrate import combine
from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import AttentionShape, GroupShape, PhaseWorkload
from longspan.bench.schedules import HEAD_SHAPES, ScheduleCell, run_attention
from longspan.bench.situation import Situation, estimates, lay_out
from longspan.config import CostConstants, Fixed, ParallelConfig
from longspan.errors import ConfigError
from longspan.parallel.grid import Grid
from longspan.planner.hardware import hardware
from tests.traffic import KEY_SCHEDULES, QUERY_SCHEDULES, TRAVELLING

LLAMA_405B_RANK = AttentionShape(q_heads=16, kv_heads=1, head_dim=128, element_bytes=2)
# Context Parallelism for Scalable Million-Token Inference (2024), table 4: new tokens of 128,000, ms by pass-KV, pass-Q
MILLION_TOKENS = [
    (1280, 1023.39, 898.71), (4160, 1298.92, 1280.10), (12800, 2080.67, 2205.27), (38400, 4629.23, 4922.52),
    (64000, 6845.21, 7367.99), (102400, 10105.78, 10652.39),
]  # fmt: skip


def model_of(grid: Grid, shape: AttentionShape, constants: CostConstants) -> CostModel:
    group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)))
    return CostModel(shape, group, SCHEDULES, constants)


@pytest.mark.parametrize(("new", "keys_ms", "queries_ms"), MILLION_TOKENS)
def test_the_faster_ring_on_four_published_machines(new, keys_ms, queries_ms):
    grid = Grid(ParallelConfig(8, 4, 1, ranks_per_node=8))
    model = model_of(grid, LLAMA_405B_RANK, hardware("h100-meta").cost)
    (found,) = estimates(Situation(grid, new, 128_000 - new), model)
    chosen = next(e.schedule for e in found if e.schedule.startswith("ring"))
    taken = {"ring_kv": keys_ms, "ring_q": queries_ms}[chosen]
    assert taken / min(keys_ms, queries_ms) < 1.015


def workload_of(new: int, cached: int, grid: Grid) -> PhaseWorkload:
    model = model_of(grid, LLAMA_405B_RANK, CostConstants())
    return lay_out(Situation(grid, new, cached), model).workloads[0]


def test_people_can_tell_schedules_apart_and_read_white_on_their_colours():
    assert len({schedule.colour for schedule in SCHEDULES.values()}) == len(SCHEDULES)
    for schedule in SCHEDULES.values():
        red, green, blue = ((int(schedule.colour[at : at + 2], 16) / 255) ** 2.2 for at in (1, 3, 5))
        contrast = 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
        assert contrast > 3, schedule.name  # as WCAG asks of large text


def test_every_schedule_has_an_estimate():
    grid = Grid(ParallelConfig(1, 4, 1))
    found = model_of(grid, LLAMA_405B_RANK, CostConstants()).estimates(workload_of(64, 1000, grid))
    assert {e.schedule for e in found} == set(TRAVELLING)
    assert all(e.seconds > 0 and e.bytes > 0 and e.time.hidden <= e.time.transfer for e in found)


def test_decode_moves_queries_and_a_fresh_long_prompt_keys_where_links_are_slow():
    grid = Grid(ParallelConfig(1, 4, 1))
    slow = CostConstants(byte_s=1e-8, cross_byte_s=1e-8, flop_s=1e-13, copy_s=1e-12, call_s=1e-6, message_s=1e-6)
    chooser = ScheduleChooser(model_of(grid, LLAMA_405B_RANK, slow))
    assert chooser.choose(workload_of(1, 100_000, grid)) in QUERY_SCHEDULES
    assert chooser.choose(workload_of(8192, 1, grid)) in KEY_SCHEDULES


def test_a_lone_decode_row_gathers_keys_where_threads_share_cores_and_memory():
    grid = Grid(ParallelConfig(1, 2, 1))
    measured = {name: Fixed(1e-4, 2e-4) for name in TRAVELLING} | {"gather_kv": Fixed(5e-5, 2e-4)}
    constants = CostConstants(byte_s=1e-15, parallelism=2.0, fixed=measured)
    apart = model_of(grid, LLAMA_405B_RANK, constants)
    threads = replace(apart, group=replace(apart.group, shares_memory=True, shares_cores=True))
    one_row = PhaseWorkload(2)
    one_row.add("request", 0, 1, {0: 3000, 1: 3000})
    assert ScheduleChooser(apart).choose(one_row, decode=True) in QUERY_SCHEDULES
    assert ScheduleChooser(threads).choose(one_row, decode=True) == "gather_kv"


def test_over_slow_links_states_are_merged_inside_a_machine_first():
    grid = Grid(ParallelConfig(1, 8, 1, ranks_per_node=4))
    far = CostConstants(message_s=1e-6, cross_message_s=2e-5, byte_s=1e-11, cross_byte_s=1e-8, copy_s=1e-12)
    chooser = ScheduleChooser(model_of(grid, LLAMA_405B_RANK, far))
    assert chooser.choose(workload_of(64, 100_000, grid)) == "tree_q"


def test_recorded_decode_takes_the_cheapest_schedule_that_can_be_recorded_and_prefill_the_cheapest_of_all():
    grid = Grid(ParallelConfig(1, 8, 1, ranks_per_node=4))
    far = CostConstants(message_s=1e-6, cross_message_s=2e-5, byte_s=1e-11, cross_byte_s=1e-8, copy_s=1e-12)
    model, workload = model_of(grid, LLAMA_405B_RANK, far), workload_of(64, 100_000, grid)
    recorded, eager = ScheduleChooser(model, records_decode=True), ScheduleChooser(model)
    assert eager.choose(workload, decode=True) == "tree_q"
    assert SCHEDULES[recorded.choose(workload, decode=True)].recordable
    assert recorded.choose(workload) == "tree_q"


def test_a_recorded_short_step_takes_the_cheapest_schedule_that_can_be_recorded():
    grid = Grid(ParallelConfig(1, 8, 1, ranks_per_node=4))
    far = CostConstants(message_s=1e-6, cross_message_s=2e-5, byte_s=1e-11, cross_byte_s=1e-8, copy_s=1e-12)
    model, workload = model_of(grid, LLAMA_405B_RANK, far), workload_of(64, 100_000, grid)
    recorded = ScheduleChooser(model, short_rows=128)
    assert SCHEDULES[recorded.choose(workload, rows=128)].recordable
    assert recorded.choose(workload, rows=129) == "tree_q"
    assert ScheduleChooser(model).choose(workload, rows=1) == "tree_q"


def test_a_forced_schedule_is_taken_and_nothing_travels_where_nothing_must():
    grid = Grid(ParallelConfig(1, 2, 1))
    chooser = ScheduleChooser(model_of(grid, LLAMA_405B_RANK, CostConstants()), "ring_kv")
    assert chooser.choose(workload_of(8, 100, grid)) == "ring_kv"
    assert chooser.choose(PhaseWorkload(2)) == "local"


def test_a_forced_schedule_is_one_of_the_models():
    model = model_of(Grid(ParallelConfig(1, 2, 1)), LLAMA_405B_RANK, CostConstants())
    with pytest.raises(ConfigError, match="schedule=pigeon: unknown choice; use one of auto, local, gather_q"):
        ScheduleChooser(model, "pigeon")


def test_constants_of_ranks_combine_to_medians_and_the_slowest_schedules():
    ranks = [CostConstants(call_s=s, fixed={"ring_q": Fixed(s, 2 * s)}) for s in (1.0, 2.0, 9.0)]
    both = combine(ranks)
    assert both.call_s == 2.0
    assert both.fixed["ring_q"] == Fixed(9.0, 18.0)


def test_an_unknown_accelerator_is_refused_with_the_names():
    with pytest.raises(ConfigError, match=r"hardware=abacus: is not in the table; use one of a100-80, h100"):
        hardware("abacus")


@pytest.mark.slow
def test_the_benchmark_counts_the_bytes_of_the_formulas():
    layouts = [(1, 2, 1), (2, 2, 2)]
    cells = [ScheduleCell(heads, *layout, new, 100) for heads in HEAD_SHAPES for layout in layouts for new in (1, 40)]
    results = run_attention("threads", cells, 1, lambda _: None)
    assert [result.cell for result in results] == cells
    for result in results:
        assert {timing.schedule for timing in result.timings} == set(TRAVELLING)
        assert all(timing.bytes == timing.formula_bytes for timing in result.timings)
        assert result.regret >= 0 and math.isfinite(result.regret)
