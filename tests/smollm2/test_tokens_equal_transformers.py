"""A real model: greedy tokens and their log-probabilities are transformers', on every layout."""

import pytest
import torch

from longspan import SamplingParams
from longspan.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from longspan.engine.engine import Engine
from tests.smollm2.conftest import long_prompt, reference, short_prompts
from tests.traffic import schedules_that_moved

pytestmark = pytest.mark.smollm2
TOP = 20
TOKENS = 12  # of a few layouts; all layouts are asked for more
SHORT = [  # tp, pcp, dcp, page size, chunk, schedule
    (1, 1, 1, 16, 2048, "auto"),
    (3, 2, 3, 5, 33, "gather_q"),
]
LONG = (1, 2, 1, 16, 512, "auto")
SIZES = (1, 2, 3, 4, 8)
ALL = [
    (tp, pcp, dcp, page, chunk, schedule)
    for tp, dcp in ((1, 1), (3, 1), (3, 3), (9, 1), (9, 3), (9, 9))
    for pcp in SIZES
    for page, chunk, schedule in ((1, 50, "gather_q"), (16, 2048, "auto"), (64, 300, "gather_kv"))
    if tp * pcp <= 9
]


def check(prompts, layout, max_tokens=TOKENS):
    tp, pcp, dcp, page_size, chunk, schedule = layout
    config = EngineConfig(
        "smollm2",
        dtype="float32",
        num_threads=1,  # a rank: several tests run beside each other
        parallel=ParallelConfig(tp, pcp, dcp),
        cache=CacheConfig(page_size=page_size, memory_bytes=512 << 20),
        scheduler=SchedulerConfig(max_num_batched_tokens=chunk, max_num_seqs=8, local_context=8, schedule=schedule),
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=TOP, ignore_eos=True)
    outputs = {}
    with Engine(config) as engine:
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, params)
        while engine.has_unfinished:
            outputs.update({output.request_id: output.outputs[0] for output in engine.step() if output.finished})
        if schedule != "auto":
            assert schedules_that_moved(engine) == ({schedule} if pcp * dcp > 1 else set())
    for number, prompt in enumerate(prompts):
        tokens, logprobs = reference(tuple(prompt), max_tokens)
        output = outputs[str(number)]
        assert output.token_ids == tokens
        for entry, expected in zip(output.logprobs, logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(entry.top_values), expected[list(entry.top_ids)], atol=1e-3, rtol=0)


@pytest.mark.parametrize("layout", SHORT, ids=str)
def test_short_prompts(layout):
    check(short_prompts(), layout)


def test_a_prompt_of_1000_tokens_in_two_chunks():
    check([long_prompt()[-1000:]], LONG)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", ALL, ids=str)
def test_every_layout(layout):
    check([*short_prompts(), long_prompt()[-1500:]], layout, max_tokens=64)
