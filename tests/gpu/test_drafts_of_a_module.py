"""A module drafts on a GPU as on a CPU: tokens are those without drafts, in steps that are recorded and in others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longspan import LLM, SamplingParams
from longspan.engine.rank.build import TensorParallelGroup
from longspan.engine.rank.draft_graphs import DraftGraphs, RecordedParts
from tests.drafting import eagle3_folder, folder_with_module, predictable_folder
from tests.engine.conftest import THREADS
from tests.engine.drafted import drafts_in, plain_tokens, start
from tests.engine.test_recorded_decode import Counting
from tests.gpu.test_one_rank_nccl import group
from tests.oracle import prompt_of

__all__ = ["group"]  # a fixture
pytest.importorskip("triton")
from longspan.attention.backends.triton.backend import TritonBackend

PROMPTS = [prompt_of(33), prompt_of(50, 2)]
PENALISED = SamplingParams(temperature=0, max_tokens=20, frequency_penalty=0.4, repetition_penalty=1.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ahead"),
    [("deepseek-v3", False), ("deepseek-v3", True), pytest.param("glm4-moe", True, marks=pytest.mark.exhaustive)],
)
def test_refilled_plans_of_triton_give_the_drafts_of_plain_operations(name, ahead) -> None:
    """Kernels run in Triton's interpreter. Latents, and keys and values."""
    folder, drafts = folder_with_module(name, "near"), []
    prompts, params = [prompt_of(9)], SamplingParams(temperature=0, max_tokens=4)
    for recorded in (False, True):
        with start(folder, speculative="mtp:2", attention_backend="torch", async_scheduling=ahead) as llm:
            (runner,) = llm.engine.executor.runners
            attention, drafter, recorder = runner.attention, runner.drafter, Counting()
            if recorded:
                backend = TritonBackend(attention.pool.device, attention.ops.value_dim)
                attention.ops = replace(attention.ops, backend=backend)
                parts = RecordedParts(
                    runner.model, attention, backend, drafter.chain, backend, drafter.first_input
                )  # fmt: skip
                runner.drafter = drafter.with_graphs(DraftGraphs(parts, recorder, (4,), ()))
            drafts.append(drafts_in(llm))
            found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
            assert found == plain_tokens(folder, tuple(map(tuple, prompts)), params)
            assert (recorder.replayed >= 4) == recorded
    assert drafts[0] == drafts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_tokens_are_those_without_drafts_and_some_drafts_are_right(eager: bool, ahead: bool) -> None:
    found, params = [], [SamplingParams(temperature=0, max_tokens=14), PENALISED]
    for drafts in ({}, {"speculative": f"eagle3:3:{eagle3_folder('near')}"}):
        options = {**THREADS, "device": "cuda", "dtype": "float32", "enforce_eager": eager, **drafts}
        options["async_scheduling"] = ahead
        with LLM(predictable_folder("llama-seven"), **options) as llm:
            (runner,) = llm.engine.executor.runners
            found.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)])
            accepted = llm.stats().scheduler.accepted_tokens
    assert found[0] == found[1]
    assert accepted > 0
    assert runner.drafter.chain is not None
    assert (runner.drafter.graphs is None) == eager


def tokens_of_tp(tp: int, executor: str) -> list[tuple[int, ...]]:
    """Tokens of an engine that drafts ahead of the driver, in steps that are recorded."""
    drafts = f"eagle3:3:{eagle3_folder('near')}"
    options = {**THREADS, "device": "cuda", "dtype": "float32", "executor": executor, "tensor_parallel_size": tp}
    with LLM(predictable_folder("llama-seven"), **options, speculative=drafts, async_scheduling=True) as llm:
        assert llm.engine.setup.records_drafts
        outputs = llm.generate(PROMPTS, [SamplingParams(temperature=0, max_tokens=14), PENALISED])
        assert llm.stats().scheduler.accepted_tokens > 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.gpu
def test_sums_are_part_of_both_graphs(group, monkeypatch) -> None:
    """NCCL's, of a group of one rank that sends: on more GPUs ranks that share heads have them in their graphs."""
    expected, sums = tokens_of_tp(1, "threads"), []

    def all_reduce(_: TensorParallelGroup, x: torch.Tensor) -> torch.Tensor:
        sums.append(torch.cuda.is_current_stream_capturing())
        return group.all_reduce(x, "tp")

    monkeypatch.setattr(TensorParallelGroup, "all_reduce", all_reduce)
    assert tokens_of_tp(1, "threads") == expected
    assert any(sums)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_of_two_gpus_that_share_heads_record_their_drafts() -> None:
    assert tokens_of_tp(2, "processes") == tokens_of_tp(1, "processes")
