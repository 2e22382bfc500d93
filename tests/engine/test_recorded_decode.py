"""Decode steps of fixed size: the same tokens as steps of any shape, whether they are recorded or run anew."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from longspan import SamplingParams
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.pool import SlotWriter
from longspan.config import CostConstants, Fixed
from longspan.engine.rank.graphs import GraphRunner, graph_sizes, padded_rows
from longspan.engine.rank.recorder import CudaRecorder, EagerRecorder
from longspan.engine.rank.short_steps import ShortSteps
from longspan.engine.setup import EngineSetup
from tests.oracle import greedy, oracle, prompt_of
from tests.traffic import schedules_that_moved

PROMPTS = [prompt_of(21), prompt_of(5, 3), prompt_of(13, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=9)
SMALL_SIZES = graph_sizes(8)


class Runs:
    """Runs at one place; the next `fill` shows in whatever holds them."""

    def __init__(self, backend, rows, has_room):
        self.backend, self.rows, self.has_room = backend, rows, has_room
        self.prepared = backend.prepare((), rows)

    def fill(self, runs):
        if self.has_room:
            self.prepared = self.backend.prepare(runs, self.rows)
        return self.has_room

    def attend(self, q, kv, blocks, scale, dtype=None):
        assert len(q) == self.rows
        return self.prepared.attend(q, kv, blocks, scale, dtype)


class Writer:
    """Slots at one place."""

    def __init__(self, writes, rows):
        self.rows = rows
        self.refill(writes)

    def refill(self, writes):
        self.writer = SlotWriter(writes, self.rows, torch.device("cpu"))

    def write(self, cache, k, v):
        self.writer.write(cache, k, v)


class RefillableCpu(CpuBackend, RecordableBackend):
    """The CPU's kernels over runs and slots that are refilled."""

    has_room = True

    def refillable(self, rows, slots, buffer):
        return Runs(self, rows, self.has_room)

    def writer(self, writes, rows, buffer=None):
        return Writer(writes, rows)


class RefillableTorch(TorchBackend, RecordableBackend):
    """Plain operations over runs of several rows that are refilled."""

    causal_runs = True
    has_room = True

    def refillable(self, rows, slots, buffer):
        return Runs(self, rows, True)

    def indexed(self, rows, longest, index):
        return Runs(self, rows, self.has_room)

    def writer(self, writes, rows, buffer=None):
        return Writer(writes, rows)


class Counting(EagerRecorder):
    """Runs the work anew, and counts how often."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.results = []  # of all runs

    def record(self, work, rows=None):
        replay = super().record(lambda: self.results.append(work()) or self.results[-1])
        self.recorded += 1

        def counted():
            self.replayed += 1
            return replay()

        return counted


def record(llm, has_room=True, sizes=SMALL_SIZES):
    """Let every rank decode by recordings of the given sizes, by default those up to 8 rows; what counts them."""
    recorder = Counting()
    for runner in llm.engine.executor.runners:
        backend = RefillableCpu()
        backend.has_room = has_room
        runner.attention.ops = replace(runner.attention.ops, backend=backend)
        runner.cuda_graphs = GraphRunner(
            runner.model, runner.attention, backend, recorder, llm.engine.setup.grid.pcp, sizes
        )
    return recorder


def expected_of(model):
    return [greedy(oracle(model), prompt, 9)[0] for prompt in PROMPTS]


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("model", ["llama", "deepseek-v3", "gpt-oss"])
@pytest.mark.parametrize("layout", [{}, {"pcp": 2}, {"tp": 2, "dcp": 2}, {"tp": 2, "pcp": 2, "dcp": 2}], ids=str)
def test_tokens_are_those_of_the_oracle(tiny, model, layout):
    """Contexts of 8 tokens stay at home, so that rows of both kinds meet in a step."""
    llm = tiny(model, schedule="gather_q", **layout)
    recorder = record(llm)
    assert tokens_of(llm) == expected_of(model)
    assert recorder.replayed >= 8
    assert schedules_that_moved(llm) == ({"gather_q"} if layout else set())


def test_a_mixture_is_recorded_where_every_rank_gets_all_rows(tiny, monkeypatch):
    """The graph's ranks have equally many rows, the steps before it do not."""
    monkeypatch.setattr(EngineSetup, "gathers_rows", True)
    llm = tiny("deepseek-v3", pcp=2, tp=2, schedule="gather_q", enable_expert_parallel=True)
    recorder = record(llm)
    assert tokens_of(llm) == expected_of("deepseek-v3")
    assert recorder.replayed >= 8


def test_other_schedules_are_not_recorded(tiny):
    llm = tiny(pcp=2, local_context=0, schedule="ring_q")
    recorder = record(llm)
    assert tokens_of(llm) == expected_of("llama")
    assert recorder.replayed == 0
    assert schedules_that_moved(llm) == {"ring_q"}


def test_where_steps_are_recorded_decode_takes_a_schedule_that_can_be(tiny):
    """With constants by which another one is cheaper: it would be computed without a graph."""
    slow_gathering = CostConstants(fixed={"gather_q": Fixed(1.0, 1.0)})
    llm = tiny(pcp=2, local_context=0, cost=slow_gathering)
    tokens_of(llm)
    assert "gather_q" not in schedules_that_moved(llm)
    scheduler = llm.engine.scheduler
    model = scheduler.chooser.model
    of_gpus = replace(model, group=replace(model.group, maps_pools=False))
    scheduler.chooser = replace(scheduler.chooser, model=of_gpus, records_decode=True)
    recorder = record(llm)
    assert tokens_of(llm) == expected_of("llama")
    assert recorder.replayed >= 8
    assert "gather_q" in schedules_that_moved(llm)


def test_a_recording_serves_all_steps_of_its_size(tiny):
    llm = tiny()
    recorder = record(llm)
    tokens_of(llm)
    first = recorder.recorded
    tokens_of(llm)
    assert recorder.recorded == first <= 3


def test_a_context_too_scattered_for_the_buffers_is_attended_all_the_same(tiny):
    """On one rank or all: the shapes of what travels are those of the recording."""
    llm = tiny(pcp=2, local_context=0, schedule="gather_q")
    recorder = record(llm, has_room=False)
    assert tokens_of(llm) == expected_of("llama")
    assert recorder.replayed == 0
    assert schedules_that_moved(llm) == {"gather_q"}


def test_a_step_planned_ahead_is_recorded_too(tiny):
    llm = tiny(pcp=2, schedule="gather_q", async_scheduling=True)
    recorder = record(llm)
    assert tokens_of(llm) == expected_of("llama")
    assert recorder.replayed > 0
    assert schedules_that_moved(llm) == {"gather_q"}


def test_sizes_have_room_and_are_few():
    assert [padded_rows(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 250)] == [1, 2, 4, 4, 8, 8, 16, 256]


def test_all_sizes_are_recorded_on_one_stream_since_each_stream_keeps_a_workspace(monkeypatch):
    """Of PyTorch's calls: there is no device to ask how much memory streams hold."""
    streams, captured = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(MagicMock()) or streams[-1])
    for name in ("graph_pool_handle", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, stream=None, **__: captured.append(stream) or nullcontext())
    recorder = CudaRecorder(torch.device("cuda", 0))
    for _ in range(3):
        recorder.record(lambda: torch.zeros(1))
    assert len(streams) == 1
    assert captured == streams * 3


def of_layout(setup):
    """What the recordings of short steps depend on."""
    schedules = setup.recorded_schedules
    return {
        "schedules": [name for name in schedules if name], "pcp": setup.grid.pcp, "shared": None not in schedules,
    }  # fmt: skip


def record_short_steps(llm, has_room=lambda rank: True):
    """Let every rank record short steps of up to 32 rows: of each step (rows of the fullest pcp index, phases, schedule
    of the recording or None without one) on each rank, and what counts each rank's recordings and replays."""
    setup, steps, recorders = llm.engine.setup, [], []
    nothing_travels = "fresh" if None not in setup.recorded_schedules else "local"

    def watched(step, found):
        def of_plan(plan, requests, place):
            short = step(plan, requests, place)
            pcps = [segment.pcp for segment in plan.segments for _ in range(segment.length)]
            phases = len({segment.prefill for segment in plan.segments})
            found.append((max(map(pcps.count, pcps)), phases, short and (short.schedule or nothing_travels)))
            return short

        return of_plan

    for rank, runner in enumerate(llm.engine.executor.runners):
        backend = RefillableTorch(torch.device("cpu"))
        backend.has_room = has_room(rank)
        runner.attention.ops = replace(runner.attention.ops, backend=backend)
        recorders.append(Counting())
        steps.append([])
        common = runner.model, runner.attention, backend
        short = ShortSteps(*common, recorders[-1], (16, 32), **of_layout(setup))
        short.step = watched(short.step, steps[-1])
        runner.cuda_graphs = GraphRunner(*common, EagerRecorder(), setup.grid.pcp, short=short)
    return steps, recorders


CHUNKS, LENGTHS = [prompt_of(12), prompt_of(5, 3), prompt_of(61, 9), prompt_of(61, 9)], (7, 4, 4, 4)


def tokens_of_chunks(llm):
    params = [SamplingParams(temperature=0, max_tokens=length) for length in LENGTHS]
    return [output.outputs[0].token_ids for output in llm.generate(CHUNKS, params)]


def expected_of_chunks(model):
    return [greedy(oracle(model), *each)[0] for each in zip(CHUNKS, LENGTHS, strict=True)]


def sharded(layout):
    """Options of a layout, with the schedule under which short steps are recorded where contexts are sharded."""
    return {**layout, "schedule": "gather_q"} if {"pcp", "dcp"} & {*layout} else layout


SHORT_LAYOUTS = {
    "alone": ({}, {"local"}),
    "heads": ({"tp": 2}, {"local"}),
    "dcp": ({"tp": 2, "dcp": 2}, {"fresh", "gather_q"}),
    "dcp, heads": ({"tp": 4, "dcp": 2}, {"fresh", "gather_q"}),
    "dcp, ahead": ({"tp": 2, "dcp": 2, "async_scheduling": True}, {"fresh", "gather_q"}),
    "pcp": ({"pcp": 2}, {"local", "gather_q"}),
    "pcp, dcp": ({"tp": 2, "pcp": 2, "dcp": 2}, {"fresh", "gather_q"}),
}
"""Layouts, and under which schedules some short step is recorded there."""


@pytest.mark.parametrize("layout", SHORT_LAYOUTS)
@pytest.mark.parametrize("model", ["llama", "gpt-oss", "deepseek-v3"])
def test_recorded_short_steps_with_prompt_tokens_give_the_tokens_of_the_oracle(tiny, model, layout):
    """First and later chunks, decode rows beside them, contexts at home and spread, and windows; a chunk of more rows
    is run without a graph."""
    options, schedules = SHORT_LAYOUTS[layout]
    llm = tiny(model, max_num_seqs=2, **sharded(options))
    (steps, *others), recorders = record_short_steps(llm)
    assert tokens_of_chunks(llm) == expected_of_chunks(model)
    assert all(each == steps for each in others)
    assert all((schedule is not None) == (rows <= 32) for rows, _, schedule in steps)
    assert {phases for _, phases, schedule in steps if schedule} == {1, 2}
    assert {schedule for _, _, schedule in steps} - {None} == schedules
    replayed = len([schedule for _, _, schedule in steps if schedule])
    assert [recorder.replayed for recorder in recorders] == [replayed] * len(recorders)


@pytest.mark.parametrize(
    ("budget", "short_rows", "recorded"),
    [(48, 32, {"local", "gather_q"}), (80, 32, {None, "local", "gather_q"}), (48, 0, {None, "local"})],
)
def test_a_short_step_takes_a_schedule_that_can_be_recorded(tiny, budget, short_rows, recorded):
    """With constants by which another one is cheaper, which long chunks take: of a pcp index more than 32 rows. If the
    driver takes it for short ones too, they are not recorded."""
    slow_gathering = CostConstants(fixed={"gather_q": Fixed(1.0, 1.0)})
    llm = tiny(pcp=2, max_num_seqs=2, max_num_batched_tokens=budget, cost=slow_gathering)
    scheduler = llm.engine.scheduler
    model = scheduler.chooser.model
    of_gpus = replace(model, group=replace(model.group, maps_pools=False))
    scheduler.chooser = replace(scheduler.chooser, model=of_gpus, records_decode=True, short_rows=short_rows)
    (steps, _), _ = record_short_steps(llm)
    assert tokens_of_chunks(llm) == expected_of_chunks("llama")
    assert {schedule for _, _, schedule in steps} == recorded
    assert (schedules_that_moved(llm) == {"gather_q"}) == (None not in recorded)


@pytest.mark.parametrize("layout", ["heads", "dcp", "pcp"])
@pytest.mark.parametrize("model", ["llama", "deepseek-v3"])
def test_a_rank_without_room_for_a_short_step_computes_it_in_the_shapes_of_the_others(tiny, model, layout):
    """Or what they exchange would have other shapes."""
    llm = tiny(model, max_num_seqs=2, **sharded(SHORT_LAYOUTS[layout][0]))
    _, (with_room, without) = record_short_steps(llm, has_room=lambda rank: rank == 0)
    assert tokens_of_chunks(llm) == expected_of_chunks(model)
    assert with_room.replayed > 0
    assert without.replayed == 0


@pytest.mark.parametrize("layout", ["heads", "dcp", "pcp"])
def test_short_steps_of_a_mixture_are_recorded_where_every_rank_gets_all_rows(tiny, monkeypatch, layout):
    monkeypatch.setattr(EngineSetup, "gathers_rows", True)
    options = sharded(SHORT_LAYOUTS[layout][0])
    llm = tiny("deepseek-v3", max_num_seqs=2, enable_expert_parallel=True, **options)
    _, recorders = record_short_steps(llm)
    assert tokens_of_chunks(llm) == expected_of_chunks("deepseek-v3")
    assert all(recorder.replayed for recorder in recorders)
