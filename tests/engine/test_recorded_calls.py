"""Decode steps on a CPU that are recorded as calls of compiled kernels: bit for bit what is computed without them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from longspan import SamplingParams
from longspan.compiled.library import library, problem_of_kernels
from longspan.compiled.recording import NotRecordable
from longspan.config import EngineConfig, ParallelConfig
from longspan.engine.setup import resolve
from longspan.models.ops import choose_ops
from tests.oracle import greedy, oracle, prompt_of, tiny_folder

pytestmark = pytest.mark.skipif(problem_of_kernels() is not None, reason=f"no kernels: {problem_of_kernels()}")
LENGTHS = (9, 21, 4, 13, 2, 17)
PROMPTS = [prompt_of(21), prompt_of(5, 3), prompt_of(13, 9), prompt_of(21)[:14] + prompt_of(3, 1), prompt_of(1), [7]]
"""The fourth begins like the first."""
X = torch.rand(8, 32)


def generated(llm):
    """The tokens of all requests, log-probabilities and cached tokens, twice: the second time prompts are cached."""
    params = [SamplingParams(temperature=0, logprobs=1, max_tokens=length) for length in LENGTHS]
    outputs = [output for _ in range(2) for output in llm.generate(PROMPTS, params)]
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.num_cached_tokens) for output in outputs]


def watch(llm):
    """The list to which every recorded step adds its number of rows."""
    rows, graphs = [], llm.engine.executor.runners[0].cuda_graphs
    logits = graphs.logits

    def watched(view, rows_of_pcp, token_ids):
        rows.append(len(token_ids))
        return logits(view, rows_of_pcp, token_ids)

    graphs.logits = watched
    return rows


@pytest.mark.parametrize("model", ["llama-wide", "qwen3-wide", "mistral-wide"])
def test_recorded_steps_give_the_bits_of_eager_ones(tiny, model):
    """Batches grow and shrink, contexts cross pages, requests are preempted and find their prompts in the cache."""
    recorded, eager = (tiny(model, pages_per_shard=[18], enforce_eager=off) for off in (False, True))
    rows = watch(recorded)
    found = generated(recorded)
    assert found == generated(eager)
    assert [tokens for tokens, *_ in found[:6]] == [
        greedy(oracle(model), prompt, length)[0] for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    assert {1, 2, 3, 4} <= set(rows)
    assert eager.engine.executor.runners[0].cuda_graphs is None
    assert recorded.engine.stats().scheduler.preemptions > 0
    assert any(cached for *_, cached in found)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_recorded_steps_on_a_quantised_cache_give_the_tokens_of_plain_kernels(tiny, dtype):
    llm = tiny("llama-wide", pages_per_shard=[18], kv_cache_dtype=dtype)
    rows = watch(llm)
    found = generated(llm)
    assert found == generated(tiny("llama-wide", pages_per_shard=[18], kv_cache_dtype=dtype, enforce_eager=True))
    plain = tiny("llama-wide", pages_per_shard=[18], kv_cache_dtype=dtype, cpu_kernels="plain")
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in generated(plain)]
    assert {1, 2, 3, 4} <= set(rows)


def test_a_step_with_more_rows_than_were_recorded_is_computed_all_the_same(tiny):
    llm = tiny("llama-wide", cudagraph_capture_sizes=(2,))
    rows = watch(llm)
    assert generated(llm) == generated(tiny("llama-wide", enforce_eager=True))
    assert set(rows) == {1, 2}


def test_a_model_with_an_operation_of_pytorch_in_its_layers_is_not_recorded(tiny, caplog):
    with caplog.at_level(logging.INFO):
        llm = tiny("llama-wide-biases")
    assert llm.engine.executor.runners[0].cuda_graphs is None
    assert "decode steps are not recorded: PyTorch computes aten.add" in caplog.text


def test_steps_are_recorded_on_one_rank_with_compiled_kernels():
    def records(cpu_kernels="compiled", **options):
        setup = resolve(EngineConfig(tiny_folder("llama-wide"), executor="dry", **options))
        return replace(setup, config=replace(setup.config, cpu_kernels=cpu_kernels)).records_calls

    assert records()
    assert not records("plain")
    assert not records(enforce_eager=True)
    assert not records(parallel=ParallelConfig(tensor_parallel_size=2))


@pytest.fixture
def norm():
    """A norm of rows [T, 32]."""
    ops, weight = choose_ops(torch.device("cpu"), compiled=True), torch.rand(32)
    return lambda x: ops.norm(x, weight, 1e-5)


def record(work):
    """The recording of work on 8 rows, of which 3 are computed."""
    with torch.inference_mode():
        return library().record(work, torch.tensor([3]), 8)


def test_a_recording_reads_its_inputs_anew_and_computes_the_rows_that_are_asked_for(norm):
    x = torch.rand(8, 32)
    repeat = record(lambda: norm(norm(x)))
    with torch.inference_mode():
        repeat().fill_(5)
    x.copy_(torch.rand(8, 32))
    found = repeat()
    assert torch.equal(found[:3], norm(norm(x))[:3])
    assert (found[3:] == 5).all()


def test_the_memory_of_a_recording_does_not_grow_with_its_layers(norm):
    def work(layers):
        y = x
        for _ in range(layers):
            y = norm(y)
        return y

    x = torch.rand(8, 32)
    blocks = [len(record(lambda layers=layers: work(layers))._held[1]._blocks) for layers in (2, 50)]
    assert blocks == [2, 2]


@pytest.mark.parametrize(
    "compute",
    [lambda x: x + 1, lambda x: x.t().contiguous(), lambda x: x * x[0, 0].item(), lambda x: x[:, torch.tensor([1, 2])]],
    ids=["sum", "copy", "value", "constant"],
)
def test_what_pytorch_computes_would_not_be_repeated_and_is_refused(norm, compute):
    with pytest.raises(NotRecordable, match="PyTorch computes"):
        record(lambda: compute(norm(X)))
    assert torch.equal(norm(X), norm(X.clone()))  # afterwards kernels run again


def test_an_operation_on_some_of_the_rows_is_refused(norm):
    with pytest.raises(NotRecordable, match="an operation on 4 rows in a step of 8"):
        record(lambda: norm(X[:4]))
