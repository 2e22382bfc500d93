"""Threads that a rank computes with: those it was given, or a share of the machine's cores."""

from __future__ import annotations

import os

import pytest
import torch

from longspan import SamplingParams
from tests.oracle import prompt_of


def threads_of_a_completion(llm) -> set[int]:
    """How many any rank had in any step."""
    seen: set[int] = set()
    for runner in llm.engine.executor.runners:

        def started(plan, start=runner.start):
            seen.add(torch.get_num_threads())
            return start(plan)

        runner.start = started
    llm.generate(prompt_of(40), SamplingParams(temperature=0, max_tokens=4))
    return seen


def test_a_rank_has_the_threads_that_the_user_gives_it_however_few_are_busy(tiny):
    assert threads_of_a_completion(tiny(pcp=4, num_threads=1, local_context=0)) == {1}


@pytest.mark.parametrize(("cores", "threads"), [(2, {1, 2}), (8, {2, 8})])
def test_a_lone_busy_rank_takes_the_idle_ranks_cores_and_no_more_than_there_are(tiny, monkeypatch, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert threads_of_a_completion(tiny(pcp=4, num_threads=None, local_context=0)) == threads
