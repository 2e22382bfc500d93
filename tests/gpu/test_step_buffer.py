"""What a recorded decode step sends to its GPU: one copy, at fixed addresses, without waiting."""

from __future__ import annotations

import pytest
import torch

from longspan import LLM, SamplingParams
from longspan.attention.step_buffer import StepBuffer
from tests.engine.conftest import THREADS
from tests.oracle import greedy, oracle, prompt_of, tiny_folder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_fields_keep_their_addresses_and_arrive_together(device):
    buffer = StepBuffer(torch.device(device))
    sizes = [(3, torch.int32), (5, torch.int64), (40_000, torch.int32), (1, torch.int64)]
    fields = [buffer.reserve(count, dtype) for count, dtype in sizes]
    addresses = [field.device.data_ptr() for field in fields]
    for step in range(3):
        for number, field in enumerate(fields):
            field.host[:] = 10 * step + number
        buffer.send()
        for number, field in enumerate(fields):
            assert field.device.tolist() == [10 * step + number] * len(field.host)
    assert addresses == [field.device.data_ptr() for field in fields]
    assert all(address % 16 == 0 for address in addresses)


@pytest.mark.gpu
def test_recorded_steps_of_scattered_contexts_give_the_tokens_of_the_oracle_and_never_wait_for_the_gpu():
    """Requests that grow side by side: their pages alternate, so that every context is read through the index."""
    prompts = [prompt_of(11 + number, number + 1) for number in range(6)]
    options = {**THREADS, "dtype": "float32", "async_scheduling": True}
    with LLM(tiny_folder("llama"), **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=24)
        llm.generate(prompts, params)  # records
        (runner,) = llm.engine.executor.runners
        replay = runner._replay

        def watched(*step):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return replay(*step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runner._replay = watched
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert found == [greedy(oracle("llama"), prompt, 24)[0] for prompt in prompts]
