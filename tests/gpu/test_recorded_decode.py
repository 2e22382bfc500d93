"""Decode steps of fixed size through the Triton kernels, and as CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan import LLM, SamplingParams
from longspan.engine.rank.graphs import GraphRunner
from longspan.engine.rank.recorder import EagerRecorder
from tests.engine.conftest import THREADS
from tests.oracle import greedy, oracle, prompt_of, tiny_folder

pytest.importorskip("triton")
from longspan.attention.backends.triton.backend import TritonBackend

PROMPTS = [prompt_of(11), prompt_of(5, 3)]
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("model", ["llama", "deepseek-v3", "gpt-oss"])
def test_refilled_plans_give_the_tokens_of_the_oracle(model):
    with LLM(tiny_folder(model), **{**THREADS, "dtype": "float32"}) as llm:
        (runner,) = llm.engine.executor.runners
        ops = runner.attention.ops
        backend = TritonBackend(runner.attention.pool.device, ops.value_dim)
        runner.attention.ops = replace(ops, backend=backend)
        runner.cuda_graphs = GraphRunner(runner.model, runner.attention, backend, EagerRecorder(), 1)
        assert tokens_of(llm) == [greedy(oracle(model), prompt, 4)[0] for prompt in PROMPTS]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_cuda_graphs_give_the_tokens_of_eager_steps(model):
    found = []
    for eager in (True, False):
        with LLM(tiny_folder(model), **{**THREADS, "dtype": "float32", "enforce_eager": eager}) as llm:
            assert (llm.engine.executor.runners[0].cuda_graphs is None) == eager
            found.append(tokens_of(llm))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [{}, {"prefill_context_parallel_size": 2}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_virtual_ranks_of_one_gpu_give_the_tokens_of_the_oracle(backend, layout):
    options = {**THREADS, "dtype": "float32", "attention_backend": backend, **layout}
    with LLM(tiny_folder("llama"), **options) as llm:
        assert tokens_of(llm) == [greedy(oracle("llama"), prompt, 4)[0] for prompt in PROMPTS]
