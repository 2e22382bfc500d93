"""How much of a GPU the cache gets, and what is said where the model does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from longspan.config import CacheConfig, EngineConfig, ParallelConfig
from longspan.engine.memory import cache_bytes, weight_format
from longspan.engine.rank.scaled_weights import ScaledChoice, ScaledWeights
from longspan.errors import ConfigError
from longspan.planner.models import find_model
from longspan.weights.formats import WeightFormat
from longspan.weights.safetensors import SafetensorsCheckpoint

GIB = 1 << 30
BF16 = WeightFormat()


def config(memory=None, utilisation=0.9, **parallel):
    cache = CacheConfig(memory_bytes=memory, gpu_memory_utilization=utilisation)
    return EngineConfig("m", cache=cache, parallel=ParallelConfig(**parallel))


def model(name):
    return find_model(name)[0]


def test_the_cache_gets_what_weights_and_workspace_leave():
    at = [cache_bytes(config(utilisation=part), model("llama-3.1-8b"), BF16, 2, 80 * GIB) for part in (0.5, 0.9)]
    assert at[1] - at[0] == pytest.approx(0.4 * 80 * GIB * 0.99, rel=1e-6)
    assert 50 * GIB < at[1] < 0.9 * 80 * GIB - 15 * GIB  # 8 billion parameters of two bytes


def test_what_the_user_asks_for_is_what_there_is():
    assert cache_bytes(config(memory=3 * GIB), model("llama-3.1-8b"), BF16, 2, 80 * GIB) == 3 * GIB


def test_a_model_that_does_not_fit_names_needed_free_and_layouts_that_would():
    with pytest.raises(ConfigError) as raised:
        cache_bytes(config(), model("llama-3-70b"), BF16, 2, 80 * GIB)
    message = str(raised.value)
    assert "weights 131." in message  # 70.6 billion parameters of two bytes, in GiB
    assert "80.0 GiB are free" in message
    assert "on 2 such GPUs these fit: -tp 2 -pcp 1 -dcp 1" in message or "on 3 such GPUs" in message


def test_a_cache_asked_for_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"cache 70\.0"):
        cache_bytes(config(memory=70 * GIB), model("llama-3.1-8b"), BF16, 2, 80 * GIB)


def test_weights_kept_in_fp8_are_counted_as_such_and_dequantised_ones_are_not(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    kept = ScaledChoice(ScaledWeights(SafetensorsCheckpoint(tmp_path), fused=False))
    values = {"quantization_config": {"quant_method": "fp8"}}
    assert weight_format(values, torch.bfloat16, kept) == WeightFormat(1.0, 1.0, 1.0, 2.0)
    assert weight_format(values, torch.bfloat16, ScaledChoice()) == BF16
