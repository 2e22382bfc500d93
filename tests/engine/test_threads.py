"""Threads that a rank computes with: those it was given, or a share of the machine's cores."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from longspan import SamplingParams
from longspan.parallel.collectives import Traffic
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric
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


def test_one_thread_of_the_process_computes_with_all_cores_whichever_rank_is_alone(tiny, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    llm = tiny(pcp=2, num_threads=None, local_context=0, page_size=4)
    alone = set()  # (rank, thread) of steps with several of torch's threads
    for rank, runner in enumerate(llm.engine.executor.runners):

        def started(plan, rank=rank, start=runner.start):
            if torch.get_num_threads() > 1:
                alone.add((rank, threading.get_ident()))
            return start(plan)

        runner.start = started
    llm.generate(prompt_of(40), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert {rank for rank, _ in alone} == {0, 1}
    assert len({thread for _, thread in alone}) == 1


@pytest.mark.parametrize("options", [{"pcp": 2, "async_scheduling": True}, {"pcp": 2, "pp": 2}], ids=str)
def test_no_rank_starts_a_step_while_another_of_its_context_group_may_read_its_pages(tiny, options):
    llm = tiny(local_context=0, **options)
    grid, ended, early = llm.engine.setup.grid, [0] * llm.engine.setup.grid.world_size, []
    for rank, runner in enumerate(llm.engine.executor.runners):

        def started(plan, rank=rank, start=runner.start):
            early.extend(other for other in grid.context_group(rank) if ended[other] < plan.step - 1)
            time.sleep(0.01 * (rank % 2))  # one of two is late
            result = start(plan)
            ended[rank] = plan.step
            return result

        runner.start = started
    llm.generate([prompt_of(40), prompt_of(30)], SamplingParams(temperature=0, max_tokens=6))
    assert all(ended) and not early


def test_no_rank_waits_for_a_peer_that_sends_it_nothing():
    fabric = ThreadFabric(2)
    fabric.abort()  # a rank that waits is told that its peer will not answer
    group = ThreadedCollectives(fabric, (0, 1), 0, Traffic())
    own, received = group.all_to_all([torch.ones(2, 3)] * 2, [(2, 3), (0, 3)], "test")
    assert own.shape == (2, 3) and received.shape == (0, 3)


def test_no_thread_is_left_once_an_engine_is_shut_down(tiny):
    before = set(threading.enumerate())
    with tiny(pcp=2, num_threads=None, local_context=0, page_size=4) as llm:
        llm.generate(prompt_of(40), SamplingParams(temperature=0, max_tokens=4))
        assert any(thread.name == "longspan-wide" for thread in set(threading.enumerate()) - before)
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name != "longspan-kernels"]
