"""What a rank does before it is ready: decode steps are recorded and every kind of step is run once.

The engine does neither on a CPU with these models, whose heads are too narrow for its kernels; here both are done by
hand, with a recorder that only notes.
"""

from __future__ import annotations

from dataclasses import replace
from threading import Thread

import pytest

from longspan import SamplingParams
from longspan.attention.cost import StepTotals
from longspan.attention.workload import WorkloadTotals
from longspan.cache.pages import PageTable
from longspan.config import CostConstants, EngineConfig, ParallelConfig, SchedulerConfig
from longspan.engine.rank.build import make_ready
from longspan.engine.rank.graphs import graph_sizes, padded_rows
from longspan.engine.rank.recorder import CountedRecorder, EagerRecorder
from longspan.engine.rank.warmup import largest_plans, warmup_plans
from longspan.engine.setup import resolve
from tests.engine.test_recorded_decode import expected_of, record, record_short_steps, tokens_of
from tests.oracle import prompt_of, tiny_folder
from tests.traffic import schedules_that_moved

LAYOUTS = [{}, {"pcp": 2}, {"tp": 2, "dcp": 2}, {"tp": 2, "pcp": 2, "dcp": 2}]
"""No shard but one, shards on other pcp indices, shards in one TP group, and both."""


def make_all_ready(llm):
    """On all ranks at once, because they send to each other."""
    on_all_ranks(llm, lambda runner: make_ready(runner, llm.engine.setup, shown=False))


def on_all_ranks(llm, call):
    """Call with every runner, each in a thread of its own."""
    failures = []

    def tried(runner):
        try:
            call(runner)
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=tried, args=(runner,)) for runner in llm.engine.executor.runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def recorded(llm):
    """What each rank has recorded, as (rows, schedule)."""
    return [[(size.rows, size.schedule) for size in r.cuda_graphs.recorded] for r in llm.engine.executor.runners]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_ranks_record_all_that_requests_meet_the_largest_size_first(tiny, layout):
    """In the same order on all ranks, because they send to each other; the tokens are those of the oracle."""
    llm = tiny(schedule="gather_q" if layout else "auto", async_scheduling=True, **layout)
    recorder = record(llm)
    make_all_ready(llm)
    names = ["gather_q"] if "dcp" in layout else [None, "gather_q"] if "pcp" in layout else [None]
    expected = [(rows, name) for rows in (8, 4, 2, 1) for name in names]
    assert recorded(llm) == [expected] * len(llm.engine.executor.runners)
    replayed = recorder.replayed
    assert tokens_of(llm) == expected_of("llama")
    assert recorded(llm) == [expected] * len(llm.engine.executor.runners)
    assert recorder.replayed > replayed
    assert schedules_that_moved(llm) == ({"gather_q"} if layout else set())


@pytest.mark.parametrize(
    ("model", "options"), [("llama", {"page_size": 1}), ("llama-deep", {"pp": 2}), ("gpt-oss", {"pcp": 2})]
)
def test_warm_up_runs_on_pages_of_one_token_on_stages_and_with_windows_and_leaves_no_request(tiny, model, options):
    llm = tiny(model, schedule="auto" if "pp" in options else "ring_q", **options)
    for plan in warmup_plans(llm.engine.setup):
        llm.engine.executor.submit(plan)
        llm.engine.executor.collect(lambda: None)
    assert all(not runner._mirror.requests for runner in llm.engine.executor.runners)


def test_the_largest_steps_have_all_tokens_of_a_step_and_all_requests(tiny):
    setup = tiny(pcp=2).engine.setup
    lengths = [[segment.length for segment in plan.segments] for plan in largest_plans(setup)]
    assert max(map(sum, lengths)) == setup.config.scheduler.step_tokens
    assert [1] * setup.config.scheduler.running_limit in lengths


def test_warm_up_samples_in_every_way_alone_and_together(tiny):
    setup = tiny().engine.setup
    kinds = {
        frozenset(admission.params for admission in plan.admitted) for plan in warmup_plans(setup)
        if plan.admitted and all(not segment.prefill for segment in plan.segments)
    }  # fmt: skip
    assert {1, 7} <= {len(kind) for kind in kinds}
    assert len([kind for kind in kinds if len(kind) == 1]) == 7


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 33, 250, 256, 1000, 3000])
def test_the_sizes_have_room_for_every_step_that_the_scheduler_can_make(most):
    sizes = graph_sizes(most)
    assert all((padded_rows(rows, sizes) or 0) >= rows for rows in range(1, most + 1))
    assert len(sizes) < 2 or sizes[-2] < most


def test_sizes_that_the_user_chooses_may_leave_larger_steps_without_a_graph(tiny):
    assert graph_sizes(250, (8, 1, 512, 4, 1024)) == (1, 4, 8, 512)
    llm = tiny(cudagraph_capture_sizes=[1])
    recorder = record(llm, sizes=graph_sizes(8, (1,)))
    make_all_ready(llm)
    assert tokens_of(llm) == expected_of("llama")
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    ("layout", "schedule", "expected"),
    [
        ({}, "auto", [None]),
        ({"pcp": 2}, "auto", [None, "gather_q"]),
        ({"tp": 2, "dcp": 2}, "auto", ["gather_q"]),
        ({"pcp": 2}, "local", [None]),
        ({"pcp": 2}, "ring_q", [None]),
    ],
)
def test_steps_are_recorded_with_the_schedules_that_can_occur(layout, schedule, expected):
    parallel = ParallelConfig(layout.get("tp", 1), layout.get("pcp", 1), layout.get("dcp", 1))
    options = {"parallel": parallel, "scheduler": SchedulerConfig(schedule=schedule), "executor": "dry"}
    setup = resolve(EngineConfig(tiny_folder("llama"), **options))
    assert list(setup.recorded_schedules) == expected


def test_the_logits_of_all_sizes_are_rows_of_one_buffer(tiny):
    llm = tiny()
    recorder = record(llm)
    make_all_ready(llm)
    assert recorder.recorded == 4
    assert len({result.data_ptr() for result in recorder.results}) == 1


class Silent(EagerRecorder):
    """What is run again counts nothing, as in a CUDA graph."""

    def __init__(self, traffic):
        self.traffic = traffic

    def record(self, work, rows=None):
        replay = super().record(work)

        def silent():
            before = self.traffic.counts()
            result = replay()
            self.traffic.replace(before)
            return result

        return silent


@pytest.mark.parametrize("layout", [{"pcp": 2}, {"tp": 2, "dcp": 2}], ids=str)
def test_a_replay_counts_what_the_step_sends_and_a_recording_counts_nothing(tiny, layout):
    found = []
    for silent in (False, True):
        llm = tiny(schedule="gather_q", **layout)
        recorder = record(llm)
        traffics = [runner._groups.context.traffic for runner in llm.engine.executor.runners]
        for runner, traffic in zip(llm.engine.executor.runners, traffics, strict=True):
            if silent:
                runner.cuda_graphs._recorder = CountedRecorder(Silent(traffic), traffic)
        on_all_ranks(llm, lambda runner, llm=llm: runner.cuda_graphs.record(llm.engine.setup.recorded_schedules))
        assert not silent or not llm.stats().traffic.bytes_by_label
        for traffic in traffics:
            traffic.reset()
        assert tokens_of(llm) == expected_of("llama")
        assert silent or recorder.replayed
        found.append(llm.stats().traffic)
    assert found[0].bytes_by_label["gather_q"] > 0
    assert (found[0].bytes_by_label, found[0].calls_by_label) == (found[1].bytes_by_label, found[1].calls_by_label)


@pytest.mark.parametrize("layout", [{"pcp": 2}, {"tp": 2, "dcp": 2}], ids=str)
def test_a_replayed_short_step_counts_what_its_padded_rows_send(tiny, layout):
    """What is counted is what the schedule's formula says of the recordings' rows: the last 13 of 61 tokens travel, and
    under PCP both halves of the first 48."""
    llm = tiny(schedule="gather_q", **layout)
    (steps, _), _ = record_short_steps(llm)
    setup = llm.engine.setup
    for runner in llm.engine.executor.runners:
        traffic = runner._groups.context.traffic
        runner.cuda_graphs.short._recorder = CountedRecorder(Silent(traffic), traffic)
    on_all_ranks(llm, lambda runner: list(runner.cuda_graphs.short.record()))
    assert not llm.stats().traffic.bytes_by_label
    llm.generate([prompt_of(61)], SamplingParams(temperature=0, max_tokens=1))
    sent = 0
    for rows in (16 if rows <= 16 else 32 for rows, _, schedule in steps if schedule == "gather_q"):
        totals = WorkloadTotals((rows,) * setup.grid.pcp, (), (), ())
        sent += setup.schedules["gather_q"].bytes(StepTotals(setup.cost_model(CostConstants()), totals))
    counted = llm.stats().traffic.bytes_by_label["gather_q"]
    assert counted == setup.model.num_layers * setup.grid.head_shards * sent > 0


@pytest.mark.parametrize("layout", [{}, {"pcp": 2}, {"tp": 2, "dcp": 2}], ids=str)
def test_warm_up_runs_the_long_steps_of_a_backend_over_adjacent_pages_and_over_runs_of_pages(tiny, layout):
    """Those that fit: up to 16 tokens a pcp index, and as many positions as the model has."""
    schedule = "gather_q" if layout else "auto"
    llm = tiny(schedule=schedule, max_num_batched_tokens=32, kv_cache_memory_bytes=1 << 21, **layout)
    setup = llm.engine.setup
    long_steps = [(16, 128, False), (16, 64, True), (64, 64, False), (16, 4096, False)]
    record = replace(setup.backend.record, long_steps=tuple(long_steps))
    setup = replace(setup, backend=replace(setup.backend, record=record))
    found = set()
    for plan in warmup_plans(setup):
        for each in plan.admitted:
            table = PageTable(setup.config.cache.page_size, setup.grid.num_shards)
            table.extend(each.pages)
            for segment in plan.segments:
                if segment.request_id == each.request_id and segment.start >= 64:
                    shard = table.shard_of(segment.start)
                    assert shard in setup.grid.shards_of_pcp[segment.pcp]  # so its tokens are written
                    held = table.visible(shard, segment.start)
                    found.add((segment.length, held, len(table.spans(shard, segment.start)) > 1))
        llm.engine.executor.submit(plan)
        llm.engine.executor.collect(lambda: None)
    assert found == set(long_steps[:2])
