"""Ranks that share memory read each other's pages where they lie: the tokens of one rank, and nothing is sent."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import cycle

import pytest

from longspan import SamplingParams
from longspan.cache.pages import PageRef
from longspan.compiled.library import problem_of_kernels
from longspan.config import EngineConfig, ParallelConfig, SchedulerConfig
from longspan.config.speculation import Speculation
from longspan.engine.setup import resolve
from longspan.errors import ConfigError, WorkerDied
from longspan.plan.plan import Admission, NewPages, Segment, StepPlan
from tests.oracle import greedy, oracle, prompt_of, tiny_folder
from tests.pairs import each_value
from tests.traffic import schedules_that_moved

PROMPTS = [prompt_of(61), prompt_of(5, 3), prompt_of(33, 9), prompt_of(61)[:40] + prompt_of(3, 1)]
"""The last begins like the first."""
LENGTHS = (9, 21, 14, 6)
MAPPED = {"schedule": "mapped_kv", "local_context": 0}
compiled = pytest.mark.skipif(problem_of_kernels() is not None, reason=f"no kernels: {problem_of_kernels()}")


def generated(llm, prompts=PROMPTS, lengths=LENGTHS):
    """Tokens, log-probabilities and cached tokens of all requests, twice: the second time prompts are cached."""
    params = [SamplingParams(temperature=0, logprobs=1, max_tokens=length) for length in lengths]
    outputs = [output for _ in range(2) for output in llm.generate(prompts, params)]
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.num_cached_tokens) for output in outputs]


def expected(model, prompts=PROMPTS, lengths=LENGTHS):
    return [greedy(oracle(model), prompt, length)[0] for prompt, length in zip(prompts, lengths, strict=True)] * 2


CASES = each_value(
    {
        "model": ["llama", "llama-wide", "gpt-oss", "deepseek-v3", "mistral-wide", "llama-multi-query"],
        "layout": [{"pcp": 2}, {"pcp": 3}, {"tp": 2, "dcp": 2}, {"tp": 2, "pcp": 2, "dcp": 2}, {"pcp": 2, "pp": 2}],
        "page_size": [4, 1, 16],
        "max_num_batched_tokens": [48, 8, 19, 256],
        "options": [{}, {"kv_cache_dtype": "int8"}, {"async_scheduling": True}, {"speculative": "prompt-lookup:3"}],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_tokens_are_those_of_the_oracle(tiny, case):
    given = dict(case)
    model, layout, options = given.pop("model"), given.pop("layout"), given.pop("options")
    llm = tiny(model, **MAPPED, **layout, **options, **given)
    found = generated(llm)
    if "kv_cache_dtype" in options:
        assert [one[0] for one in found] == [one[0] for one in generated(tiny(model, **options))]
    else:
        assert [one[0] for one in found] == expected(model)
    assert any(cached for *_, cached in found)
    assert llm.stats().decode_schedule == "mapped_kv"
    assert schedules_that_moved(llm) <= {"mapped_kv"}


@compiled
@pytest.mark.parametrize("model", ["llama-wide", "mistral-wide"])
def test_recorded_steps_of_several_ranks_give_the_bits_of_eager_ones(tiny, model):
    """Owners are different ranks, contexts cross pages, requests are preempted and find their prompts in the cache."""
    recorded, eager = (
        tiny(model, pcp=2, pages_per_shard=[14, 12], enforce_eager=off, **MAPPED) for off in (False, True)
    )
    rows = [watch(runner) for runner in recorded.engine.executor.runners]
    found = generated(recorded)
    assert found == generated(eager)
    assert [tokens for tokens, *_ in found] == expected(model)
    assert all({0, 1, 2} <= set(of_rank) for of_rank in rows)
    assert eager.engine.executor.runners[0].cuda_graphs is None
    assert recorded.engine.stats().scheduler.preemptions > 0


def watch(runner):
    """The list to which every recorded step of a rank adds its number of rows."""
    rows, logits = [], runner.cuda_graphs.logits

    def watched(view, rows_of_pcp, token_ids):
        rows.append(len(token_ids))
        return logits(view, rows_of_pcp, token_ids)

    runner.cuda_graphs.logits = watched
    return rows


def test_a_decode_token_sends_nothing_and_only_its_rank_computes(tiny):
    engine = tiny(pcp=2, **MAPPED).engine
    engine.add_request("a", PROMPTS[0], SamplingParams(temperature=0, max_tokens=8))
    while engine.progress("a")[0] < len(PROMPTS[0]):
        engine.step()
    sent = dict(engine.stats().traffic.bytes_by_label)
    assert sent["mapped_kv"] > 0  # signals of the prefill
    for _ in range(4):
        engine.step()
    sent["debug"] = engine.stats().traffic.bytes_by_label["debug"]
    assert engine.stats().traffic.bytes_by_label == sent


@pytest.mark.parametrize("late", [0, 1], ids=["reader", "writer"])
def test_steps_that_are_submitted_at_once_read_each_others_pages_in_order(tiny, late):
    """Rank 0 reads in the second step the page that rank 1 writes in the first, and gives to another in the third."""
    llm = tiny(pcp=2, page_size=8, async_scheduling=True, debug=False, **MAPPED)  # in debug mode ranks wait anyway
    executor = llm.engine.executor
    attention = executor.runners[late].attention
    begin = attention.begin
    attention.begin = lambda step: (time.sleep(0.05), begin(step))
    a, b = prompt_of(12), prompt_of(8, 3)
    for plan in (
        plan_of(1, "a", a[:8], PageRef(1, 5), admitted=a),
        plan_of(2, "a", a[8:], PageRef(0, 3), start=8, schedule="mapped_kv"),
        plan_of(3, "b", b, PageRef(1, 5), admitted=b, finished=("a",)),
    ):
        executor.submit(plan)
    sampled = [token.token_id for _ in range(3) for token in executor.collect(lambda: None).tokens]
    assert sampled == [greedy(oracle("llama"), prompt, 1)[0][0] for prompt in (a, b)]


def plan_of(step, request, tokens, page, start=0, schedule="local", admitted=(), finished=()):
    """A step in which the rank of a new page computes a chunk; the last chunk of a prompt is sampled."""
    params = SamplingParams(temperature=0)
    admissions = (Admission(request, len(admitted), 0, params, (), ()),) if admitted else ()
    chunk = Segment(
        request, start, tuple(tokens), page.shard, prefill=True, num_remote_groups=int(schedule != "local"),
        sample=int(len(tokens) in (4, len(admitted))),
    )  # fmt: skip
    pages = (NewPages(request, (page,)),)
    return StepPlan(step, (), (), finished, admissions, pages, (chunk,), ("local",), (schedule,))


def test_a_layer_reads_what_a_late_rank_has_yet_to_write_in_the_same_step(tiny):
    """Each rank is late in some layers."""
    llm = tiny(pcp=2, **MAPPED)
    for number, runner in enumerate(llm.engine.executor.runners):
        write_late(runner.attention, cycle((0.0, 0.004)[:: 1 - 2 * number]))
    assert [one[0] for one in generated(llm)] == expected("llama")


def write_late(attention, delays):
    """Let a rank sleep before it writes the keys of a layer."""
    begin = attention.begin

    class Late:
        def __init__(self, writer):
            self.write = lambda *given: (time.sleep(next(delays)), writer.write(*given))

    attention.begin = lambda step: begin(replace(step, writer=Late(step.writer)))


def test_a_rank_that_fails_does_not_leave_another_waiting_for_its_signal(tiny):
    llm = tiny(pcp=2, **MAPPED)

    def fail(*_):
        raise RuntimeError("out of order")

    write_late(llm.engine.executor.runners[1].attention, iter(fail, None))
    with pytest.raises(WorkerDied, match="out of order"):
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))


def test_the_schedule_is_chosen_only_where_ranks_are_threads_on_a_cpu():
    def schedules(pcp=2, **options):
        parallel = ParallelConfig(prefill_context_parallel_size=pcp)
        return resolve(EngineConfig(tiny_folder("llama"), parallel=parallel, **options), needs_weights=False)

    assert schedules(executor="threads").possible_schedules[-1] == "mapped_kv"
    assert not schedules(pcp=1, executor="threads").maps_pools
    assert not schedules(executor="processes").maps_pools
    forced = SchedulerConfig(schedule="mapped_kv")
    with pytest.raises(ConfigError, match="schedule=mapped_kv: needs ranks that are threads on a CPU"):
        schedules(executor="processes", scheduler=forced)
    drafting = replace(forced, speculative=Speculation("mtp", 2))
    with pytest.raises(ConfigError, match=r"schedule=mapped_kv: .* do not draft with a model"):
        schedules(executor="threads", scheduler=drafting)


def test_it_is_the_measured_choice_where_it_can_be_made(tiny):
    llm = tiny(pcp=2, cost=None, local_context=0)
    assert [one[0] for one in generated(llm)] == expected("llama")
    assert llm.engine.core.constants.fixed["mapped_kv"].one > 0
    assert llm.stats().decode_schedule == "mapped_kv"
