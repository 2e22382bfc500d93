"""A module for multi-token prediction drafts on a GPU as on a CPU: tokens are those without drafts."""

from __future__ import annotations

import pytest

from longspan import LLM, SamplingParams
from tests.drafting import folder_with_module
from tests.engine.conftest import THREADS
from tests.oracle import prompt_of

pytestmark = pytest.mark.gpu
PROMPTS = [prompt_of(33), prompt_of(50, 2)]


def test_tokens_are_those_without_drafts_and_some_drafts_are_right() -> None:
    found, params = [], SamplingParams(temperature=0, max_tokens=14)
    for drafts in ({}, {"speculative": "mtp:3"}):
        options = {**THREADS, "device": "cuda", "dtype": "float32", "enforce_eager": True, **drafts}
        with LLM(folder_with_module("deepseek-v3", "near"), **options) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)])
            accepted = llm.stats().scheduler.accepted_tokens
    assert found[0] == found[1]
    assert accepted > 0
