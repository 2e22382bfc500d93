"""The search for layouts: which are found, their order, and the errors if none is valid or fits."""

from dataclasses import replace

import pytest

from longspan.config import ParallelConfig
from longspan.errors import ConfigError
from longspan.parallel.grid import layouts
from longspan.planner.deployment import Deployment
from longspan.planner.forecast import Forecast, Interval, TrafficLoad, forecast, time_to_first_token
from longspan.planner.hardware import Hardware, hardware
from longspan.planner.layouts import FixedSizes, pareto_set, plan_layouts, smallest_layout
from longspan.planner.models import find_model
from longspan.planner.step import StepModel

LOAD = TrafficLoad(32768, concurrency=4)


def base(name: str = "llama-3-70b", machine: str = "h200") -> Deployment:
    model, weights = find_model(name)
    return Deployment(model, hardware(machine), ParallelConfig(), weights, 2)


def test_every_layout_of_eight_devices_is_tried_once():
    found = [parallel.name for parallel in layouts(8)]
    assert len(found) == len(set(found)) == 20
    assert {"tp=8,pcp=1,dcp=8,pp=1", "tp=2,pcp=2,dcp=2,pp=2", "tp=1,pcp=8,dcp=1,pp=1"} <= set(found)


def test_layouts_whose_tp_does_not_divide_the_heads_are_not_tried():
    found = plan_layouts(base(), 6, FixedSizes(), LOAD, "ttft")
    assert {one.parallel.tensor_parallel_size for one in found} == {1, 2}


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("ttft", lambda one: one.ttft.seconds), ("tpot", lambda one: one.tpot.seconds),
        ("throughput", lambda one: -one.throughput_per_gpu), ("capacity", lambda one: -one.capacity_tokens),
    ],
)  # fmt: skip
def test_layouts_are_in_the_order_of_the_objective(objective, value):
    found = [one for one in plan_layouts(base(), 8, FixedSizes(), LOAD, objective) if one.running]
    assert [value(one) for one in found] == sorted(map(value, found))


@pytest.mark.parametrize(
    ("objective", "kept"), [("ttft", "acd"), ("capacity", "ace")]
)  # b has the TTFT of a and a higher TPOT; d and e have equal times, but e has more capacity
def test_no_layout_of_the_pareto_set_is_dominated(objective, kept):
    times = {"a": (1.0, 9.0, 5), "b": (1.0, 10.0, 5), "c": (2.0, 8.0, 5), "d": (3.0, 7.0, 5), "e": (3.0, 7.0, 6)}
    found = [
        Forecast(ParallelConfig(), capacity, 1, 1.0, 0.0, 1, Interval(ttft, "", {}), Interval(tpot, "", {}))
        for ttft, tpot, capacity in times.values()
    ]
    assert pareto_set(found, LOAD, objective) == [found["abcde".index(name)] for name in kept]


def test_the_smallest_layout_uses_the_fewest_devices_and_prefers_tp():
    assert smallest_layout(base(), 32768) == ParallelConfig(2)
    assert smallest_layout(base("llama-3.1-8b"), 32768) == ParallelConfig(1)
    assert smallest_layout(base("llama-3.1-8b", "rtx-5090"), 200_000) == ParallelConfig(2)
    assert smallest_layout(base("kimi-k2"), 4_000_000) == ParallelConfig(16, 1, 8)
    with pytest.raises(ConfigError, match="does not fit on 64 devices"):
        smallest_layout(base(), 1_000_000_000)


def test_layouts_that_do_not_fit_come_last_with_the_missing_bytes():
    found = plan_layouts(base(), 8, FixedSizes(), LOAD, "ttft")
    assert found[-1].parallel == ParallelConfig(1, 8)
    assert found[-1].missing_bytes > 0 == found[-1].running


def test_only_layouts_with_the_fixed_sizes_are_returned():
    assert all(
        one.parallel.decode_context_parallel_size == 4
        for one in plan_layouts(base(), 8, FixedSizes(dcp=4), LOAD, "ttft")
    )


def test_an_invalid_size_is_refused_with_valid_layouts():
    with pytest.raises(ConfigError, match=r"layout=tp=3: is not possible on 8 devices .* use one of tp=8"):
        plan_layouts(base(), 8, FixedSizes(tp=3), LOAD, "ttft")


def test_a_fixed_layout_that_does_not_fit_is_refused_with_layouts_that_do():
    with pytest.raises(ConfigError, match=r"a rank lacks \d+\.\d GB .*; use 8 devices, with tp=8"):
        plan_layouts(base(), 8, FixedSizes(tp=1, pcp=8), LOAD, "ttft")


def test_too_few_devices_are_refused_with_a_sufficient_number():
    with pytest.raises(ConfigError, match="use 4 devices, with tp=4"):
        plan_layouts(base("llama-3-405b"), 2, FixedSizes(), LOAD, "ttft")


def test_the_concurrency_is_limited_to_the_requests_that_fit():
    deployed = replace(base(), parallel=ParallelConfig(8))
    found = forecast(deployed, TrafficLoad(1_000_000, concurrency=1000))
    assert found.running == found.requests == int(deployed.capacity_tokens / TrafficLoad(1_000_000).tokens)


def test_a_cached_prefix_shortens_the_time_to_first_token():
    model = StepModel(replace(base(), parallel=ParallelConfig(8)))
    assert time_to_first_token(model, 65536, 1024).seconds < time_to_first_token(model, 65536, 65536).seconds / 10


def test_the_time_of_a_pipeline_has_a_bubble_and_is_the_sum_of_its_parts():
    found = time_to_first_token(StepModel(replace(base(), parallel=ParallelConfig(2, 1, 1, 4))), 65536, 65536)
    assert found.parts["bubble"] > 0
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_the_bubble_of_a_pipeline_is_paid_once_for_all_chunks():
    """Four stages on hardware where a step takes one second for each token of context, and nothing else.

    Chunks of 4, 4 and 2 tokens take 4, 8 and 10 s, so 1, 2 and 2.5 s in each stage. The last stage finishes after
    (1 + 2 + 2.5) + 3 x 2.5 = 13 s.
    """
    instant = Hardware(1e15, 1e6, 1e15, 1e15, 1e15, kernel_s=1e-30, message_s=1e-30, step_s=1e-30, prompt_token_s=1.0)
    model, weights = find_model("llama-3.1-8b")
    stages = ParallelConfig(pipeline_parallel_size=4)
    deployed = Deployment(model, instant, stages, weights, 2, max_num_batched_tokens=16)
    found = time_to_first_token(StepModel(deployed), 10, 10)
    assert found.seconds == pytest.approx(13.0)
    assert found.parts["bubble"] == pytest.approx(7.5)


def test_a_token_more_than_full_chunks_does_not_shorten_the_time_of_a_pipeline():
    model = StepModel(replace(base(), parallel=ParallelConfig(1, 1, 1, 8)))
    assert time_to_first_token(model, 65537, 65537).seconds > time_to_first_token(model, 65536, 65536).seconds


@pytest.mark.parametrize("bad", [{"context": 0}, {"new": 0}, {"new": 200}, {"output": 0}, {"concurrency": 0}])
def test_an_impossible_load_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TrafficLoad(**{"context": 100, **bad})
