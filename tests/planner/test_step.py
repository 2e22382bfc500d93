"""The predicted time of a step: how it depends on sizes, schedules and hardware."""

from dataclasses import replace

import pytest

from longspan.config import ParallelConfig
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import Hardware, hardware
from longspan.planner.linear import measured
from longspan.planner.models import find_model
from longspan.planner.step import Chunk, StepModel, StepTime

SMALL_CPU = Hardware(
    tflops=0.1, memory_gb=16, memory_tb_s=0.02, intra_gb_s=10, inter_gb_s=10, tile_rows=1,
    product_s=((1, 2e-10), (8, 4e-10), (64, 1e-9)), calls_per_segment=True,
)  # fmt: skip

ALONE = ParallelConfig()


def model_of(name: str, parallel: ParallelConfig = ALONE, machine: Hardware | None = None) -> StepModel:
    config, weights = find_model(name)
    return StepModel(Deployment(config, machine or hardware("h200"), parallel, weights, 2))


def prompt(new: int, cached: int = 0, pcp: int = 1, shards: int = 1) -> Chunk:
    return Chunk(new, cached, (new // pcp,) * pcp, ((new + cached) // shards,) * shards, True)


def decoding(context: int, shards: int = 1) -> Chunk:
    return Chunk(1, context - 1, (1,), (context // shards,) * shards, False)


def attention(step: StepTime) -> float:
    return step.parts["attention"]


def test_the_time_of_a_step_is_the_sum_of_its_parts():
    step = model_of("llama-3-70b", ParallelConfig(8, 1, 8)).time(
        [decoding(8000, 8), prompt(512, 1600, 1, 8)], "auto", "auto"
    )
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_attention_grows_with_the_square_of_a_prompts_length_and_products_linearly():
    model = model_of("llama-3.1-8b")
    short, long = (model.time([prompt(new)], "local", "local") for new in (65536, 131072))
    assert attention(long) / attention(short) == pytest.approx(4, rel=0.05)
    assert long.parts["linear"] / short.parts["linear"] == pytest.approx(2, rel=0.01)
    assert long.bound == "compute"


def test_the_chunks_of_a_prompt_need_as_much_attention_as_the_whole():
    model = model_of("llama-3.1-8b")
    chunks = [attention(model.time([prompt(8192, at)], "local", "local")) for at in range(0, 65536, 8192)]
    assert sum(chunks) == pytest.approx(attention(model.time([prompt(65536)], "local", "local")), rel=0.05)


def test_a_decode_step_reads_the_weights_once_for_the_whole_batch():
    model = model_of("llama-3.1-8b")
    one, many = (model.time([decoding(100)] * batch, "local", "local") for batch in (1, 16))
    assert one.bound == "memory"
    assert many.parts["linear"] < 1.1 * one.parts["linear"]


def test_the_transfers_of_a_ring_overlap_with_a_long_prompt_and_not_with_few_tokens():
    layout = ParallelConfig(8, 4)
    model = model_of("llama-3-405b", layout, hardware("h100-meta"))
    latencies = model.time([prompt(4, 0, 4, 4)], "ring_kv", "ring_kv").parts["exchange"]
    long = model.time([prompt(131072, 0, 4, 4)], "ring_kv", "ring_kv").parts["exchange"]
    few = model.time([prompt(1280, 126720, 4, 4)], "ring_kv", "ring_kv").parts["exchange"]
    assert long < 8 * latencies < few


def test_the_schedule_auto_is_the_cheapest():
    model = model_of("llama-3-70b", ParallelConfig(8, 1, 4))
    chunk = [decoding(100_000, 4)]
    named = [model.time(chunk, name, name).seconds for name in ("gather_q", "ring_q", "gather_kv", "ring_kv", "tree_q")]
    assert model.time(chunk, "auto", "auto").seconds <= min(named)


def test_more_context_ranks_read_a_long_cache_faster():
    alone, spread = (
        attention(model_of("deepseek-v3", ParallelConfig(8, 1, dcp)).time([decoding(131072, dcp)], "auto", "auto"))
        for dcp in (1, 8)
    )
    assert spread < alone / 4


def test_layers_with_a_window_take_time_only_for_the_tokens_in_it():
    config, weights = find_model("gpt-oss-120b")
    shape = Deployment(config, hardware("h200"), ParallelConfig(), weights, 2)
    everywhere = replace(shape, model=replace(config, windows=()))
    windowed, full = (StepModel(one).time([prompt(65536)], "local", "local") for one in (shape, everywhere))
    assert attention(windowed) / attention(full) == pytest.approx(0.5, rel=0.05)


def test_a_batch_uses_more_experts_than_a_token():
    model = model_of("qwen3-235b-a22b", ParallelConfig(8))
    one, many = (model.time([decoding(100)] * batch, "local", "local").parts["linear"] for batch in (1, 32))
    assert 2 < many / one < 32


def test_all_reduces_between_machines_take_longer_than_inside_one():
    config, weights = find_model("llama-3-70b")
    near, far = (
        StepModel(Deployment(config, hardware("h200"), ParallelConfig(8), weights, 2, gpus_per_node=size))
        for size in (8, 4)
    )
    times = [model.time([prompt(8192)], "local", "local").parts["tp"] for model in (near, far)]
    assert times[1] > 2 * times[0]


def test_ranks_that_share_a_machine_slow_each_other_down():
    alone = model_of("smollm2-135m", ParallelConfig(1, 2), SMALL_CPU)
    sharing = model_of("smollm2-135m", ParallelConfig(1, 2), replace(SMALL_CPU, parallelism=1.0))
    chunk = [prompt(64, 0, 2, 2)]
    times = [model.time(chunk, "gather_q", "gather_q").parts["linear"] for model in (alone, sharing)]
    assert times[1] == pytest.approx(2 * times[0])


def test_measured_products_replace_the_peak_rates():
    assert measured(SMALL_CPU.product_s, 1) == 2e-10
    assert measured(SMALL_CPU.product_s, 36) == pytest.approx(7e-10)
    assert measured(SMALL_CPU.product_s, 128) == pytest.approx(2e-9)
    doubled = replace(SMALL_CPU, product_s=tuple((rows, 2 * s) for rows, s in SMALL_CPU.product_s), tflops=9.0)
    slow, fast = (
        model_of("smollm2-135m", machine=one).time([decoding(64)], "local", "local") for one in (doubled, SMALL_CPU)
    )
    assert slow.parts["head"] > 1.5 * fast.parts["head"]


def test_with_calls_per_segment_every_segment_is_an_attention_call():
    chunks = [decoding(64)] * 8
    each = model_of("smollm2-135m", machine=SMALL_CPU).time(chunks, "local", "local")
    batched = model_of("smollm2-135m", machine=replace(SMALL_CPU, calls_per_segment=False))
    assert attention(each) > attention(batched.time(chunks, "local", "local"))
