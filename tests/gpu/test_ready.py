"""After a start on a GPU no request waits for a kernel to compile or a graph to be recorded."""

from __future__ import annotations

import time

import pytest

from longspan import LLM, SamplingParams
from tests.engine.conftest import DEFAULTS
from tests.oracle import prompt_of, tiny_folder

pytestmark = pytest.mark.gpu
LENGTHS = (30, 1, 7, 100, 47)
PARAMS = [SamplingParams(max_tokens=6, temperature=t, top_p=p) for t, p in ((0, 1), (1, 1), (0.8, 0.9))]


@pytest.fixture(scope="module", params=["llama", "deepseek-v3"])
def started(request):
    options = {**DEFAULTS, "dtype": "bfloat16", "max_num_batched_tokens": 512, "debug": False}
    with LLM(tiny_folder(request.param), **options) as llm:
        yield llm


def test_the_first_requests_compile_no_kernel_and_record_no_graph(started, monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(str(given.get("fn"))))
    graphs = started.engine.executor.runners[0].cuda_graphs
    before = None if graphs is None else graphs.recorded
    assert graphs is None or len(before) == 4
    for number, length in enumerate(LENGTHS):
        for params in PARAMS:
            started.generate([prompt_of(length, number)], params)
    started.generate([prompt_of(length, 9) for length in LENGTHS], PARAMS[2])
    assert compiled == []
    assert graphs is None or graphs.recorded == before


def test_the_first_token_of_a_short_prompt_takes_no_longer_than_later_ones(started):
    """Printed, not asserted: what is asserted is that nothing is compiled."""
    for _ in range(3):
        begin = time.perf_counter()
        started.generate([prompt_of(30, 77)], SamplingParams(max_tokens=1, temperature=1, top_p=0.9))
        print(f"30 tokens to the first token: {(time.perf_counter() - begin) * 1e3:.1f} ms")
