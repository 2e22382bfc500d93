"""What tests of drafts share: engines that draft, their tokens, and every draft that they make."""

from __future__ import annotations

from functools import cache

import pytest

from longspan import LLM, SamplingParams
from tests.engine.conftest import SHORT, THREADS
from tests.oracle import prompt_of

PROMPTS = [prompt_of(33), prompt_of(7, 3) * 2, prompt_of(50, 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=14)


def start(folder, **options):
    """An engine on a folder, with its options by the short names of sizes."""
    return LLM(folder, **{**THREADS, **{SHORT.get(name, name): value for name, value in options.items()}})


def named(cases):
    """Cases of a parametrised test, each with its values as its name."""
    return [pytest.param(case, id="-".join(map(str, case.values()))) for case in cases]


def tokens_of(llm, prompts=PROMPTS, params=GREEDY):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@cache
def plain_tokens(folder, prompts=None, params=GREEDY, **options):
    """The tokens without drafts. `prompts` are tuples, so that they are computed once."""
    with start(folder, **options) as llm:
        return tokens_of(llm, PROMPTS if prompts is None else [list(prompt) for prompt in prompts], params)


def drafts_in(llm):
    """(text so far, what is drafted after it), of every step and request from now on."""
    scheduler, found = llm.engine.scheduler, []
    commit = scheduler.commit

    def recorded(plan, result):
        counted = commit(plan, result)
        for request in {token.request_id for token in counted.tokens}:
            sequence = scheduler._sequences[request]
            found.append((tuple(sequence.tokens), tuple(sequence.expected)))
        return counted

    scheduler.commit = recorded
    return found
