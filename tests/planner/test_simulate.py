"""A simulation makes the decisions of the engine; steps that are advanced at once do not change its results."""

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
from longspan.planner.simulate.instance import InstanceConfig, SimulatedInstance
from longspan.planner.simulate.run import choose, simulate
from longspan.planner.simulate.trace_requests import TraceRequest, read_requests
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


def play(settings, requests, instances=1):
    return simulate(settings, requests, instances, limits(settings), lambda done: None)


def random_asks(count, gap_s, seed=0, most=300):
    generator = random.Random(seed)
    at, requests = 0.0, []
    for number in range(count):
        at += generator.expovariate(1 / gap_s)
        prompt = generator.randrange(1, most)
        requests.append(TraceRequest(number, at, prompt, generator.randrange(1, 120), (generator.randrange(3),)))
    return requests


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
def test_advancing_equal_steps_at_once_does_not_change_the_report(name, instances):
    settings, gap_s = LOADS[name]
    requests = random_asks(40, gap_s)
    assert play(settings, requests, instances) == play(replace(settings, skip_repeated=False), requests, instances)


def test_the_preempting_load_has_preemptions():
    settings, gap_s = LOADS["preempting"]
    assert play(settings, random_asks(40, gap_s)).preemptions


def test_most_steps_of_a_long_decode_are_not_scheduled_one_by_one():
    settings = config(pages=(8, 8), page_size=512)
    instance = SimulatedInstance(settings)
    planned = []
    schedule = instance.scheduler.schedule
    instance.scheduler.schedule = lambda: planned.append(1) or schedule()
    instance.add(0, 4000, 400, (), 0.0)
    instance.advance(float("inf"))
    assert instance.steps > 400 and len(planned) < 60


def test_the_first_token_has_the_time_at_which_the_prompts_step_ends():
    result = play(config(), [TraceRequest(0, 5.0, 20, 1, (0,))])
    expected = STEP_S + 20 * (TOKEN_S + CONTEXT_S)
    assert result.report.ttft_s.mean == pytest.approx(expected)


def test_a_request_waits_for_the_step_in_flight():
    settings = config()
    first = STEP_S + 100 * (TOKEN_S + CONTEXT_S)
    instance = SimulatedInstance(settings)
    instance.add(0, 100, 1, (), 0.0)
    instance.advance(first / 2)
    late = instance.add(1, 10, 1, (), first / 2)
    instance.advance(float("inf"))
    assert late.token_times == [pytest.approx(first + STEP_S + 10 * (TOKEN_S + CONTEXT_S))]


def test_given_page_keys_place_and_share_pages_as_real_tokens_do(tmp_path):
    rows = [
        {"timestamp": 400 * n, "input_length": length, "output_length": 40, "hash_ids": ids}
        for n, (length, ids) in enumerate([(1100, [1, 2, 3]), (1500, [1, 2, 4]), (700, [1, 5]), (1100, [1, 2, 3])])
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = config(pages=(200, 200), max_num_batched_tokens=512)
    requests = read_requests(str(path), None, 1.0)
    prompts = [request.prompt for request in open_dataset(RequestLoad("trace", str(path), 4)).requests(0)]
    keyed, real = SimulatedInstance(settings), SimulatedInstance(settings)
    for request, prompt in zip(requests, prompts, strict=True):
        for instance in (keyed, real):
            instance.advance(request.arrival_s)
        keyed.add(
            request.number, request.prompt_tokens, request.max_tokens, list(request.page_keys(16)), request.arrival_s
        )
        real.add(request.number, request.prompt_tokens, request.max_tokens, (), request.arrival_s)
        real.scheduler.finish(str(request.number))
        real.scheduler.add(
            CoreRequest(str(request.number), prompt, SamplingParams(temperature=0), 0, request.max_tokens)
        )
        for instance in (keyed, real):
            instance.advance(request.arrival_s + 0.1)
        assert keyed.scheduler.cached_tokens(str(request.number)) == real.scheduler.cached_tokens(str(request.number))
        assert keyed.scheduler.table(str(request.number)).pages == real.scheduler.table(str(request.number)).pages
    assert keyed.scheduler.cached_tokens("3") == 1088


def test_a_shared_prefix_is_computed_once():
    twice = [TraceRequest(0, 0.0, 600, 5, (1, 2)), TraceRequest(1, 9.0, 600, 5, (1, 2))]
    other = [TraceRequest(0, 0.0, 600, 5, (1, 2)), TraceRequest(1, 9.0, 600, 5, (3, 4))]
    assert play(config(), twice).cached_tokens == 592
    assert play(config(), other).cached_tokens == 0
    assert play(replace(config(), enable_prefix_caching=False), twice).cached_tokens == 0


def test_a_request_goes_to_the_instance_with_its_prefix_or_the_least_work():
    keys = list(TraceRequest(0, 0.0, 600, 5, (1, 2)).page_keys(16))[:37]
    first, second = SimulatedInstance(config()), SimulatedInstance(config())
    assert choose([first, second], [0, 0]) == 0
    second.add(0, 600, 1, keys, 0.0)
    second.advance(9.0)
    cached = [instance.cached_tokens(keys) for instance in (first, second)]
    assert cached == [0, 592] and choose([first, second], cached) == 1
    second.add(1, 900, 5, (), 9.0)
    assert choose([first, second], cached) == 0


def test_requests_are_divided_among_the_instances():
    result = play(config(), [TraceRequest(n, 0.0, 100, 20, (n,)) for n in range(8)], 4)
    assert result.requests_by_instance == (2, 2, 2, 2)


def test_two_pipeline_stages_compute_two_steps_at_once():
    requests = [TraceRequest(n, 0.0, 10, 200, (n,)) for n in range(8)]
    parallel = ParallelConfig(1, 2, 1, 2)
    one, two = play(config(), requests), play(config(parallel=parallel), requests)
    assert two.report.duration_s < 1.2 * one.report.duration_s  # half the requests a step: twice as long one by one


def test_a_request_that_does_not_fit_fails_and_others_do_not():
    result = play(config(pages=(8, 8)), [TraceRequest(0, 0.0, 5000, 5, (0,) * 10), TraceRequest(1, 0.0, 50, 5, (1,))])
    assert (result.report.completed, result.report.failed) == (1, 1)
    assert "KV cache" in result.report.errors[0].example


def test_memory_is_sampled_at_regular_intervals_and_is_at_most_its_peak():
    memory = play(config(), random_asks(40, 0.5), 2).memory
    assert len(memory.used) == 2 and all(len(shards) == 2 for shards in memory.used)
    for used, peak in zip(memory.used, memory.peak, strict=True):
        for shard, row in enumerate(used):
            assert 100 < len(row) <= 401 and max(row) <= peak[shard] <= 64
    assert any(max(row) for used in memory.used for row in used)


def test_page_keys_follow_from_block_ids_with_any_page_size():
    one, other = TraceRequest(0, 0.0, 1200, 1, (1, 2, 3)), TraceRequest(1, 0.0, 1200, 1, (1, 2, 4))
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
def test_a_malformed_trace_is_refused_with_line_field_and_remedy(tmp_path, line, named):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_requests(str(path), None, 1.0)
    message = str(error.value)
    assert message.startswith("trace=") and "line 2" in message and named in message and "expected" in message.lower()


def test_the_gaps_between_arrivals_are_scaled(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps({**ROW, "timestamp": at}) for at in (3000, 1000)))
    assert [request.arrival_s for request in read_requests(str(path), None, 0.5)] == [0.0, 1.0]
    with pytest.raises(ConfigError, match="time_scale=0"):
        read_requests(str(path), None, 0)
