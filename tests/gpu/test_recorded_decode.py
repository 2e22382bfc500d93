"""Decode steps of fixed size through the Triton kernels, and as CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan import LLM, SamplingParams
from longspan.engine.rank.graphs import GraphRunner
from longspan.engine.rank.recorder import CudaRecorder, EagerRecorder
from longspan.engine.rank.short_steps import ShortSteps
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


class AsSharded(ShortSteps):
    """Short steps as on a rank whose TP group shares the pages of contexts: all rows travel, or all are fresh."""

    def __init__(self, *parts):
        super().__init__(*parts, (8,), schedules=["gather_q"], shared=True)
        self.taken = []  # the schedule of each step

    def _size_of(self, plan):
        found = super()._size_of(plan)
        if found is None:
            return None
        fresh = all(segment.start == 0 and segment.length > 1 for segment in plan.segments)
        self.taken.append(None if fresh else "gather_q")
        return found[0], self.taken[-1]


def tokens_of_short_steps(llm, recorder, backend):
    """The schedules of the recorded steps, of which the tokens are those of the oracle."""
    (runner,) = llm.engine.executor.runners
    parts = runner.model, runner.attention, backend
    short = AsSharded(*parts, recorder)
    runner.cuda_graphs = GraphRunner(*parts, recorder, 1, (1, 2), short)
    prompts, lengths = [prompt_of(5, 3), prompt_of(9)], (2, 1)
    outputs = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=length) for length in lengths])
    expected = [greedy(oracle("llama"), *each)[0] for each in zip(prompts, lengths, strict=True)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    return short.taken


IN_CHUNKS = {**THREADS, "dtype": "float32", "max_num_batched_tokens": 8}


def test_refilled_plans_of_short_steps_whose_queries_travel_give_the_tokens_of_the_oracle():
    with LLM(tiny_folder("llama"), **IN_CHUNKS) as llm:
        (runner,) = llm.engine.executor.runners
        ops = runner.attention.ops
        backend = TritonBackend(runner.attention.pool.device, ops.value_dim)
        runner.attention.ops = replace(ops, backend=backend)
        assert tokens_of_short_steps(llm, EagerRecorder(), backend) == [None, "gather_q"]


@pytest.mark.gpu
def test_so_do_their_cuda_graphs():
    with LLM(tiny_folder("llama"), **IN_CHUNKS, attention_backend="triton") as llm:
        (runner,) = llm.engine.executor.runners
        recorder = CudaRecorder(runner.device)
        assert tokens_of_short_steps(llm, recorder, runner.attention.ops.backend) == [None, "gather_q"]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [{}, {"prefill_context_parallel_size": 2}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_virtual_ranks_of_one_gpu_give_the_tokens_of_the_oracle(backend, layout):
    options = {**THREADS, "dtype": "float32", "attention_backend": backend, **layout}
    with LLM(tiny_folder("llama"), **options) as llm:
        assert tokens_of(llm) == [greedy(oracle("llama"), prompt, 4)[0] for prompt in PROMPTS]
