"""A simulation makes the engine's own decisions on a clock of its own; what it skips changes nothing."""

import json
import random
from dataclasses import replace

import pytest

from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import AttentionShape, GroupShape
from longspan.bench.serving.dataset import RequestLoad, open_dataset
from longspan.config import CostConstants, ParallelConfig, SchedulerConfig
from longspan.errors import ConfigError
from longspan.parallel.grid import Grid
from longspan.planner.simulate.asks import Ask, read_asks
from longspan.planner.simulate.instance import Instance, InstanceConfig
from longspan.planner.simulate.run import choose, simulate
from longspan.planner.step import StepTime
from longspan.request import CoreRequest, SamplingParams
from longspan.scheduler.limits import Limits

STEP_S, TOKEN_S, CONTEXT_S = 1e-2, 1e-4, 1e-7


class FakeTimer:
    """A step takes a fixed time, and some for each new token and each token of context."""

    def time(self, chunks, decode_schedule, prefill_schedule):
        new = sum(chunk.new_tokens for chunk in chunks)
        context = sum(sum(chunk.tokens_by_shard) for chunk in chunks)
        return StepTime(STEP_S + TOKEN_S * new + CONTEXT_S * context, {}, "compute")


def config(pages=(64, 64), page_size=16, parallel=None, **scheduling):
    grid = Grid(parallel or ParallelConfig(1, 2, 1))
    group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)))
    scheduler = SchedulerConfig(**{"max_num_batched_tokens": 128, "max_num_seqs": 8, "local_context": 32, **scheduling})
    chooser = ScheduleChooser(CostModel(AttentionShape(4, 2, 64, 2), group, SCHEDULES, CostConstants()))
    return InstanceConfig(grid, scheduler, page_size, pages, FakeTimer(), chooser)


def limits(settings):
    return Limits.of(1 << 20, settings.scheduler.schedule, settings.pages_per_shard, settings.page_size)


def play(settings, asks, instances=1):
    return simulate(settings, asks, instances, limits(settings), lambda done: None)


def random_asks(count, gap_s, seed=0, most=300):
    generator = random.Random(seed)
    at, asks = 0.0, []
    for number in range(count):
        at += generator.expovariate(1 / gap_s)
        prompt = generator.randrange(1, most)
        asks.append(Ask(number, at, prompt, generator.randrange(1, 120), (generator.randrange(3),)))
    return asks


LOADS = {
    "mostly idle": (config(), 1.0),
    "busy": (config(), 0.05),
    "full queue": (config(max_num_seqs=3), 0.02),
    "preempting": (config(pages=(14, 14)), 0.02),
    "one shard": (config(pages=(64,), parallel=ParallelConfig()), 0.1),
    "dcp": (config(parallel=ParallelConfig(2, 1, 2)), 0.1),
    "large pages": (config(pages=(8, 8), page_size=64), 0.1),
}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("instances", [1, 3])
def test_making_equal_steps_at_once_gives_the_report_of_making_each(name, instances):
    settings, gap_s = LOADS[name]
    asks = random_asks(40, gap_s)
    assert play(settings, asks, instances) == play(replace(settings, skips=False), asks, instances)


def test_the_load_that_preempts_does():
    settings, gap_s = LOADS["preempting"]
    assert play(settings, random_asks(40, gap_s)).preemptions


def test_most_steps_of_a_long_decode_are_not_planned_again():
    settings = config(pages=(8, 8), page_size=512)
    instance = Instance(settings)
    planned = []
    schedule = instance.scheduler.schedule
    instance.scheduler.schedule = lambda: planned.append(1) or schedule()
    instance.add(0, 4000, 400, (), 0.0)
    instance.advance(float("inf"))
    assert instance.steps > 400 and len(planned) < 60


def test_the_first_token_comes_when_the_prompts_step_ends():
    result = play(config(), [Ask(0, 5.0, 20, 1, (0,))])
    expected = STEP_S + 20 * (TOKEN_S + CONTEXT_S)
    assert result.report.ttft_s.mean == pytest.approx(expected)


def test_a_request_waits_for_the_step_that_is_under_way():
    settings = config()
    first = STEP_S + 100 * (TOKEN_S + CONTEXT_S)
    instance = Instance(settings)
    instance.add(0, 100, 1, (), 0.0)
    instance.advance(first / 2)
    late = instance.add(1, 10, 1, (), first / 2)
    instance.advance(float("inf"))
    assert late.token_times == [pytest.approx(first + STEP_S + 10 * (TOKEN_S + CONTEXT_S))]


def test_page_keys_given_from_outside_place_and_share_as_real_tokens_do(tmp_path):
    rows = [
        {"timestamp": 400 * n, "input_length": length, "output_length": 40, "hash_ids": ids}
        for n, (length, ids) in enumerate([(1100, [1, 2, 3]), (1500, [1, 2, 4]), (700, [1, 5]), (1100, [1, 2, 3])])
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = config(pages=(200, 200), max_num_batched_tokens=512)
    asks = read_asks(str(path), None, 1.0)
    prompts = [ask.prompt for ask in open_dataset(RequestLoad("trace", str(path), 4)).requests(0)]
    keyed, real = Instance(settings), Instance(settings)
    for ask, prompt in zip(asks, prompts, strict=True):
        for instance in (keyed, real):
            instance.advance(ask.arrival_s)
        keyed.add(ask.number, ask.prompt_tokens, ask.max_tokens, list(ask.page_keys(16)), ask.arrival_s)
        real.add(ask.number, ask.prompt_tokens, ask.max_tokens, (), ask.arrival_s)
        real.scheduler.finish(str(ask.number))
        real.scheduler.add(CoreRequest(str(ask.number), prompt, SamplingParams(temperature=0), 0, ask.max_tokens))
        for instance in (keyed, real):
            instance.advance(ask.arrival_s + 0.1)
        assert keyed.scheduler.cached_tokens(str(ask.number)) == real.scheduler.cached_tokens(str(ask.number))
        assert keyed.scheduler.table(str(ask.number)).pages == real.scheduler.table(str(ask.number)).pages
    assert keyed.scheduler.cached_tokens("3") == 1088


def test_a_shared_prefix_is_computed_once():
    twice = [Ask(0, 0.0, 600, 5, (1, 2)), Ask(1, 9.0, 600, 5, (1, 2))]
    other = [Ask(0, 0.0, 600, 5, (1, 2)), Ask(1, 9.0, 600, 5, (3, 4))]
    assert play(config(), twice).cached_tokens == 592
    assert play(config(), other).cached_tokens == 0
    assert play(replace(config(), enable_prefix_caching=False), twice).cached_tokens == 0


def test_a_request_goes_where_its_prefix_is_and_otherwise_where_least_is_ahead():
    keys = list(Ask(0, 0.0, 600, 5, (1, 2)).page_keys(16))[:37]
    first, second = Instance(config()), Instance(config())
    assert choose([first, second], [0, 0]) == 0
    second.add(0, 600, 1, keys, 0.0)
    second.advance(9.0)
    cached = [instance.cached_tokens(keys) for instance in (first, second)]
    assert cached == [0, 592] and choose([first, second], cached) == 1
    second.add(1, 900, 5, (), 9.0)
    assert choose([first, second], cached) == 0


def test_instances_share_the_load():
    result = play(config(), [Ask(n, 0.0, 100, 20, (n,)) for n in range(8)], 4)
    assert result.requests_by_instance == (2, 2, 2, 2)


def test_pipeline_stages_work_on_two_steps_at_once():
    asks = [Ask(n, 0.0, 10, 200, (n,)) for n in range(8)]
    parallel = ParallelConfig(1, 2, 1, 2)
    one, two = play(config(), asks), play(config(parallel=parallel), asks)
    assert two.report.duration_s < 1.2 * one.report.duration_s  # half the requests a step: twice as long one by one


def test_a_request_that_can_never_be_served_fails_and_others_do_not():
    result = play(config(pages=(8, 8)), [Ask(0, 0.0, 5000, 5, (0,) * 10), Ask(1, 0.0, 50, 5, (1,))])
    assert (result.report.completed, result.report.failed) == (1, 1)
    assert "KV cache" in result.report.errors[0].example


def test_memory_is_sampled_evenly_and_never_above_its_peak():
    memory = play(config(), random_asks(40, 0.5), 2).memory
    assert len(memory.used) == 2 and all(len(shards) == 2 for shards in memory.used)
    for used, peak in zip(memory.used, memory.peak, strict=True):
        for shard, row in enumerate(used):
            assert 100 < len(row) <= 401 and max(row) <= peak[shard] <= 64
    assert any(max(row) for used in memory.used for row in used)


def test_pages_are_known_by_blocks_whatever_the_page_size():
    one, other = Ask(0, 0.0, 1200, 1, (1, 2, 3)), Ask(1, 0.0, 1200, 1, (1, 2, 4))
    for size, shared, whole in ((16, 64, 75), (512, 2, 2), (1024, 1, 1)):
        keys, others = list(one.page_keys(size)), list(other.page_keys(size))
        assert len(keys) == whole and len(set(keys)) == whole
        assert [a == b for a, b in zip(keys, others, strict=True)] == [n < shared for n in range(whole)]


ROW = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{oops", "line 2"),
        (json.dumps({**ROW, "input_length": "many"}), "$.input_length"),
        (json.dumps({**ROW, "hash_ids": [1]}), "$.hash_ids"),
        (json.dumps({name: ROW[name] for name in ("timestamp", "input_length", "hash_ids")}), "output_length"),
    ],
)
def test_a_malformed_trace_names_line_field_and_what_was_expected(tmp_path, line, named):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_asks(str(path), None, 1.0)
    message = str(error.value)
    assert message.startswith("trace=") and "line 2" in message and named in message and "expected" in message.lower()


def test_gaps_between_arrivals_are_scaled(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps({**ROW, "timestamp": at}) for at in (3000, 1000)))
    assert [ask.arrival_s for ask in read_asks(str(path), None, 0.5)] == [0.0, 1.0]
    with pytest.raises(ConfigError, match="time_scale=0"):
        read_asks(str(path), None, 0)
