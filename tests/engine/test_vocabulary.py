"""The vocabulary that grammars need: read once for all ranks of a process, ahead of the first grammar if asked to."""

from __future__ import annotations

import threading

import pytest
from llguidance import LLMatcher

from longspan.config import CostConstants, EngineConfig, ParallelConfig
from longspan.engine.driver.build import build_core
from longspan.engine.driver.core import EngineCore
from longspan.engine.rank import build
from longspan.engine.setup import resolve
from longspan.request import CoreRequest, SamplingParams
from longspan.weights.tokenizer import load_serialised
from tests.server.running import ascii_folder, ascii_tokenizer


def number(core: EngineCore, request_id: str) -> str:
    """What a request writes that may write one digit only."""
    grammar = LLMatcher.grammar_from_regex("[0-9]")
    params = SamplingParams(grammar=grammar, stop_token_ids=(ascii_tokenizer().eos_token_id,))
    core.add(CoreRequest(request_id, list(range(40)), params, 0, 4))
    tokens: list[int] = []
    while core.has_unfinished:
        tokens += [token.token_id for output in core.step() for token in output.tokens]
    return str(ascii_tokenizer().decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("ahead", [True, False])
def test_ranks_of_a_process_read_it_once_and_ahead_of_the_first_grammar_if_asked_to(monkeypatch, ahead):
    loads = []

    def load(source):
        loads.append(source)
        return load_serialised(source)

    monkeypatch.setattr(build, "load_serialised", load)
    config = EngineConfig(
        ascii_folder(), executor="threads", num_threads=1, parallel=ParallelConfig(prefill_context_parallel_size=2),
        cost=CostConstants(), read_vocabulary_ahead=ahead,
    )  # fmt: skip
    core = build_core(resolve(config))
    try:
        for thread in threading.enumerate():
            if thread.name == "longspan-vocabulary":
                thread.join()
        assert len(loads) == int(ahead)
        assert all(number(core, request_id).isdigit() for request_id in "abc")
        assert len(loads) == 1
    finally:
        core.shutdown()
