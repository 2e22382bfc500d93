"""Bytes that attention exchanges under a layout: planner and engine count the same."""

from dataclasses import replace

import pytest

from longspan.config import CacheConfig, EngineConfig, ParallelConfig
from longspan.engine.setup import EngineSetup, resolve
from longspan.models.registry import load_config
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import hardware
from longspan.planner.models import find_config, find_model
from longspan.weights.builtin import builtin_names
from longspan.weights.formats import element_bytes

LAYOUTS = [ParallelConfig(1), ParallelConfig(8), ParallelConfig(8, 1, 8), ParallelConfig(4, 2, 1)]


def engine(name: str, layout: ParallelConfig, cache_dtype: str) -> EngineSetup:
    """The setup of the engine for a model without weights."""
    cache = CacheConfig(dtype=cache_dtype)
    return resolve(EngineConfig(name, parallel=layout, cache=cache, device="cpu", dtype="bfloat16", executor="dry"))


def planned(name: str, layout: ParallelConfig, cache_dtype: str) -> Deployment:
    model, weights = find_model(name, "bf16")
    stored = element_bytes("kv_cache_dtype", "bf16" if cache_dtype == "auto" else cache_dtype)
    return Deployment(model, hardware("h200"), layout, weights, int(stored))


@pytest.mark.parametrize("cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("name", builtin_names())
def test_engine_and_planner_count_the_same_bytes(name, cache_dtype):
    heads = load_config(find_config(name)).num_q_heads
    for layout in (one for one in LAYOUTS if heads % one.tensor_parallel_size == 0):
        ours, theirs = engine(name, layout, cache_dtype), planned(name, layout, cache_dtype)
        assert theirs.layout.bytes_per_token == ours.layout.bytes_per_token
        for field in ("query_bytes", "state_bytes", "kv_bytes", "q_heads", "kv_heads", "out_dim", "expansion"):
            assert getattr(theirs.attention_shape, field) == getattr(ours.attention_shape, field), (layout, field)
        assert theirs.attention_shape == ours.attention_shape


def test_queries_are_sent_in_the_dtype_of_activations_with_any_cache_dtype():
    plain, quantised = (planned("llama-3-70b", ParallelConfig(8), dtype).attention_shape for dtype in ("auto", "fp8"))
    assert plain.query_bytes == quantised.query_bytes == 8 * 128 * 2
    assert quantised.kv_bytes == 2 * (128 + 4)  # a scale for each of key and value


def test_values_wider_than_queries_are_not_expanded_in_the_planner_either():
    deployed = planned("deepseek-v3", ParallelConfig(8), "auto")
    assert deployed.model.mla is not None
    wide = replace(deployed.model, mla=replace(deployed.model.mla, value_dim=256))
    assert not replace(deployed, model=wide).attention_shape.expansion.pays(1e12, 1)
