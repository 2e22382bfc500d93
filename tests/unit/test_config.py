"""Defaults of options that are not given, and options that contradict each other."""

import pytest

from longspan import LLM
from longspan.config import CostConstants, EngineConfig, ParallelConfig, SchedulerConfig
from longspan.errors import ConfigError
from tests.oracle import tiny_folder


@pytest.mark.parametrize(
    ("given", "step_tokens", "running_limit"),
    [
        ({}, 2048, 256),
        ({"max_num_batched_tokens": 193}, 193, 193),
        ({"max_num_batched_tokens": 8192}, 8192, 256),
        ({"max_num_seqs": 4096}, 4096, 4096),
        ({"max_num_batched_tokens": 300, "max_num_seqs": 300}, 300, 300),
    ],
    ids=str,
)
def test_a_missing_batch_limit_adapts_to_the_given_one(given, step_tokens, running_limit):
    for config in (SchedulerConfig(**given), EngineConfig.of("smollm2", **given).scheduler):
        assert (config.step_tokens, config.running_limit) == (step_tokens, running_limit)


def test_batch_limits_that_contradict_each_other_are_refused():
    with pytest.raises(
        ConfigError, match=r"max_num_seqs=257: exceeds max_num_batched_tokens=256.*leave one of them out"
    ):
        SchedulerConfig(max_num_batched_tokens=256, max_num_seqs=257)


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs"])
def test_a_batch_limit_of_0_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=0: must be at least 1"):
        SchedulerConfig(**{name: 0})


def test_a_layout_is_parsed_from_its_name():
    assert ParallelConfig.parse("layout", "tp=8, dcp=4") == ParallelConfig(8, 1, 4)
    assert ParallelConfig(8, 2, 4, 3).name == "tp=8,pcp=2,dcp=4,pp=3"
    for layout in (ParallelConfig(), ParallelConfig(8, 2, 4, 3)):
        assert ParallelConfig.parse("layout", layout.name) == layout


@pytest.mark.parametrize("text", ["tp", "tp=x", "cp=2", "", "tp=2,", "pcp=²"])
def test_a_malformed_layout_is_refused_with_the_name_of_the_option(text):
    given = f"compare_layout={text}" if text else "compare_layout"
    with pytest.raises(ConfigError, match=f"{given}: .* is not a size; write it as tp=8,pcp=1,dcp=8,pp=1"):
        ParallelConfig.parse("compare_layout", text)


def test_an_engine_runs_with_a_small_max_num_batched_tokens_alone():
    with LLM(
        tiny_folder("llama"), max_num_batched_tokens=5, kv_cache_memory_bytes=1 << 20, cost=CostConstants()
    ) as llm:
        outputs = llm.generate([[1, 2, 3]] * 7)
    assert [len(one.outputs[0].token_ids) for one in outputs] == [16] * 7
