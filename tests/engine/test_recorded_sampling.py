"""After a recorded decode step tokens are drawn by a recording too: the same tokens as without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan import SamplingParams
from longspan.engine.rank import build
from longspan.engine.rank.graphs import GraphRunner, graph_sizes
from longspan.engine.rank.recorder import EagerRecorder
from longspan.engine.rank.sampling.gumbel import draw_plainly
from longspan.engine.rank.sampling.recorded import RecordedDraw
from longspan.engine.rank.sampling.sampler import Sampler
from tests.engine.test_recorded_decode import RefillableCpu
from tests.oracle import prompt_of

KINDS = [
    {"temperature": 0}, {"temperature": 0.8}, {"temperature": 1, "top_p": 0.9}, {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.2, "min_p": 0.1}, {"temperature": 1, "top_p": 0.8, "logprobs": 2},
]  # fmt: skip
PENALISED = {"temperature": 1, "repetition_penalty": 1.3}


def engine(tiny, draw=None, **options):
    """An engine that draws all rows of a step together; with `draw` this is recorded."""
    llm = tiny(**options)
    for runner in llm.engine.executor.runners:
        backend = RefillableCpu()
        runner.attention.ops = replace(runner.attention.ops, backend=backend)
        runner._sampler = Sampler(draw_plainly)
        runner.cuda_graphs = GraphRunner(
            runner.model, runner.attention, backend, EagerRecorder(), llm.engine.setup.grid.pcp, graph_sizes(8),
            draw=draw,
        )  # fmt: skip
    return llm


def outputs_of(llm, kinds):
    """Tokens and log probabilities; requests end one after the other, so that there are steps of all sizes."""
    params = [SamplingParams(max_tokens=4 + 2 * n, seed=n, **kind) for n, kind in enumerate(kinds)]
    found = llm.generate([prompt_of(5 + n, n) for n in range(len(kinds))], params)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in found]


@pytest.fixture
def drawn(monkeypatch):
    """The number of rows of each recorded draw, and whether they have filters; None for greedy ones."""
    rows, draw = [], RecordedDraw.draw

    def counted(self, parameters, positions):
        rows.append((len(positions), None if parameters is None else parameters.filters))
        return draw(self, parameters, positions)

    monkeypatch.setattr(RecordedDraw, "draw", counted)
    return rows


@pytest.mark.parametrize("options", [{}, {"pcp": 2, "schedule": "gather_q"}, {"async_scheduling": True}], ids=str)
def test_every_kind_of_row_gets_the_tokens_of_a_draw_that_is_not_recorded(tiny, drawn, options):
    wanted = outputs_of(engine(tiny, **options), KINDS)
    assert not drawn
    assert outputs_of(engine(tiny, draw_plainly, **options), KINDS) == wanted
    assert len({rows for rows, _ in drawn}) > 2


def test_greedy_rows_rows_without_filters_and_others_have_recordings_of_their_own(tiny, drawn):
    llm, plain = engine(tiny, draw_plainly), engine(tiny)
    for kind in KINDS[:3]:
        assert outputs_of(llm, [kind]) == outputs_of(plain, [kind])
    assert {filters for _, filters in drawn} == {None, False, True}


def test_rows_whose_logits_change_are_drawn_without_it_and_the_next_ones_with_it(tiny, drawn):
    llm, plain = engine(tiny, draw_plainly), engine(tiny)
    assert outputs_of(llm, [KINDS[1], PENALISED]) == outputs_of(plain, [KINDS[1], PENALISED])
    assert not drawn
    assert outputs_of(llm, KINDS[1:3]) == outputs_of(plain, KINDS[1:3])
    assert drawn


FORBIDDING = [{"temperature": 1, "allowed_token_ids": tuple(range(9))}, {"temperature": 0, "min_tokens": 3}]


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}], ids=str)
def test_rows_with_forbidden_tokens_are_drawn_beside_others_as_in_a_step_that_is_not_recorded(tiny, options):
    kinds = [KINDS[1], FORBIDDING[0], PENALISED, KINDS[0], FORBIDDING[1], KINDS[5]]
    llm, eager = engine(tiny, draw_plainly, **options), engine(tiny, **options)
    eager.engine.executor.runners[0].cuda_graphs = None
    found = outputs_of(llm, kinds)
    assert found == outputs_of(eager, kinds)
    assert set(found[1][0]) <= set(range(9))


def test_a_rank_draws_as_the_ranks_have_agreed(tiny, monkeypatch):
    rows = []

    def draw(logits, parameters, positions):
        rows.append(len(logits))
        return draw_plainly(logits, parameters, positions)

    monkeypatch.setattr(build, "agreed_draw", lambda groups, device: draw)
    tiny().generate([prompt_of(5, 0)], SamplingParams(max_tokens=3))
    assert rows == [1, 1, 1]
