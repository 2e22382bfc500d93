"""Weights in 16 or 8 bits change the tokens as their rounding does, and no layout changes them further."""

from __future__ import annotations

import pytest

from longspan import SamplingParams
from longspan.models.quantised import problem_of_form
from tests.oracle import LOGPROBS, all_logprobs, greedy, oracle, prompt_of

pytestmark = pytest.mark.skipif(problem_of_form("int8") is not None, reason="this PyTorch has no such products")
PROMPTS = [prompt_of(61), prompt_of(5, 3), prompt_of(33, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
LAYOUTS = [{"tp": 4, "dcp": 2}, {"pp": 2, "pcp": 2}]


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("model", ["llama", "gpt-oss"])
def test_every_layout_gives_the_tokens_of_one_rank(tiny, model, form):
    alone = tokens_of(tiny(model, quantization=form))
    for layout in LAYOUTS:
        llm = tiny(model, quantization=form, local_context=0, max_num_batched_tokens=23, max_num_seqs=4, **layout)
        assert tokens_of(llm) == alone, layout


@pytest.mark.parametrize(("form", "least", "most"), [("fp16", 1e-6, 0.01), ("int8", 1e-3, 0.5), ("none", 0, 1e-4)])
def test_logprobs_are_off_by_the_rounding_of_the_form_and_exact_without(tiny, form, least, most):
    expected = greedy(oracle("llama"), PROMPTS[0], 1)[1][0]
    llm = tiny("llama", quantization=form)
    [output] = llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=1, logprobs=LOGPROBS))
    assert least <= (all_logprobs(output.outputs[0])[0] - expected).abs().max() < most
