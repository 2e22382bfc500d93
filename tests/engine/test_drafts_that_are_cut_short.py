"""Requests that end, leave, give way or begin again while drafts of theirs are computed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from longspan import LLM, SamplingParams
from longspan.engine.driver.build import build_core
from longspan.scheduler.progress import progress
from tests.drafting import folder_with_module
from tests.engine.conftest import THREADS
from tests.folders import shared_folder
from tests.oracle import VOCAB, prompt_of
from tests.server.running import ascii_tokenizer

PROMPT = [*prompt_of(20), 33]  # ends with "A"; the model goes on in the alphabet
LONG = SamplingParams(temperature=0, max_tokens=24)


@cache
def folder_of(kind: str, stages: int = 1, end: int | None = None) -> str:
    """A tiny DeepSeek-V3 with a module and a tokenizer; `end` is the token that ends its outputs."""
    path = shared_folder("ascii-module") / "model"
    shutil.copytree(folder_with_module("deepseek-v3-deep" if stages > 1 else "deepseek-v3", kind), path)
    ascii_tokenizer().save_pretrained(path)
    config = json.loads(Path(path / "config.json").read_text())
    Path(path / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    return str(path)


@pytest.fixture
def engine(engines):
    """`engine("right", tp=2, ...)` starts an engine on such a model."""

    def start(kind, end=None, **options):
        return engines(folder_of(kind, options.get("pp", 1), end), **options)

    return start


def plain(prompts, params=LONG):
    """Tokens without drafts, of one rank."""
    with LLM(folder_of("near"), **THREADS) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def behind(prompt, count):
    """What the model that only counts on says behind a prompt."""
    return [(prompt[-1] + number) % VOCAB for number in range(1, count + 1)]


def letters(count):
    return behind(PROMPT, count)


def ends(count):
    """Parameters of outputs that end with token number `count`, each for another reason."""
    last = letters(count)[-1]
    text = "".join(chr(token + 32) for token in letters(count))
    free = {"temperature": 0, "max_tokens": 30}
    return [
        (SamplingParams(**{**free, "max_tokens": count}), text, "length"),
        (SamplingParams(**free, stop_token_ids=(last,)), text[:-1], "stop"),
        (SamplingParams(**free, stop=[text[-1]], include_stop_str_in_output=True), text, "stop"),
        (SamplingParams(**free, stop=[text[-2:]]), text[: max(0, count - 2)], "stop"),
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_an_output_ends_at_the_same_token_wherever_that_is_among_right_drafts(engine, ahead):
    """A step has five tokens, all right, so the ends are at each place of a step, and on both sides of one."""
    llm = engine(
        "right", speculative="mtp:4", max_num_seqs=32, max_num_batched_tokens=128, attention_backend="torch",
        async_scheduling=ahead,
    )  # fmt: skip
    cases = [(count, *case) for count in range(4, 9) for case in ends(count)]
    outputs = llm.generate([PROMPT] * len(cases), [params for _, params, _, _ in cases])
    for (count, _, text, reason), output in zip(cases, outputs, strict=True):
        found = output.outputs[0]
        assert (found.token_ids, found.text, str(found.finish_reason)) == (letters(count), text, reason)
    counters = llm.stats().scheduler
    assert counters.accepted_tokens > 0
    assert sum(llm.stats().used_pages_per_shard) == 0
    llm.engine.scheduler.check_integrity()
    # what ended outputs have left in the prefix cache is right
    longer = [PROMPT + letters(count) for count in range(4, 9)]
    for prompt, output in zip(longer, llm.generate(longer, LONG), strict=True):
        assert output.outputs[0].token_ids == behind(prompt, 24)


def test_the_models_own_end_among_right_drafts_ends_the_output_there(engine):
    llm = engine("right", end=40, speculative="mtp:4")
    for ignored in (False, True):
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=ignored)
        (output,) = llm.generate([PROMPT], params)
        assert output.outputs[0].token_ids == letters(12 if ignored else 7)


@pytest.mark.parametrize(
    "options",
    [{"pp": 2, "pcp": 2, "local_context": 0}, {"attention_backend": "torch", "async_scheduling": True}],
    ids=["stages", "ahead"],
)
def test_a_request_that_is_aborted_with_drafts_in_flight_leaves_nothing_behind(engine, options):
    llm = engine("right", speculative="mtp:3", **options)
    prompts = (PROMPT, prompt_of(33), prompt_of(9))
    core, scheduler = llm.engine.core, llm.engine.scheduler
    for name, prompt in zip("abc", prompts, strict=True):
        llm.engine.add_request(name, prompt, LONG)
    outputs, aborted = {}, False
    while llm.engine.has_unfinished:
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.engine.step()}
        flying = {
            request_id for step in core._in_flight for request_id, done in progress(step.plan.segments).items()
            if done.num_drafts and request_id.startswith("a.")
        }  # fmt: skip
        if flying and not aborted:
            llm.engine.abort("a")
            llm.engine.add_request("a", prompts[1][:20], LONG)
            aborted = True
            scheduler.check_integrity()
    assert aborted
    assert [outputs[name] for name in "abc"] == [behind(each, 24) for each in (prompts[1][:20], *prompts[1:])]
    assert sum(llm.stats().used_pages_per_shard) == 0
    scheduler.check_integrity()


@pytest.mark.parametrize("options", [{"pp": 2}, {"attention_backend": "torch", "async_scheduling": True}], ids=str)
def test_a_request_that_gives_way_with_drafts_in_flight_has_all_its_tokens(engine, options):
    llm = engine("right", pages_per_shard=(22,), speculative="mtp:3", **options)
    scheduler, core, flying = llm.engine.scheduler, llm.engine.core, []
    preempt = scheduler._preempt

    def watched(sequence):
        for step in core._in_flight:
            done = progress(step.plan.segments).get(sequence.request_id)
            flying.append(done is not None and done.num_drafts > 0)
        preempt(sequence)

    scheduler._preempt = watched
    prompts = [prompt_of(length, length) for length in (5, 11, 7, 17, 9, 14)]
    outputs = llm.generate(prompts, LONG)
    assert [output.outputs[0].token_ids for output in outputs] == [behind(prompt, 24) for prompt in prompts]
    assert any(flying)
    scheduler.check_integrity()


@pytest.mark.parametrize("drafts", ["mtp:3", "prompt-lookup:3"])
def test_a_new_core_goes_on_where_the_last_one_was_with_drafts(engine, drafts):
    """As a server does after the death of a core or a rank: it has the tokens, and neither pages nor drafts."""
    options = {"pcp": 2, "local_context": 0, "speculative": drafts}
    llm = engine("near", **options)
    prompts = [[*range(40), *range(number)] for number in (3, 8, 12)]
    params = SamplingParams(temperature=0.5, seed=6, max_tokens=30, frequency_penalty=0.1)
    expected = plain(prompts, params)
    for number, prompt in enumerate(prompts):
        llm.engine.add_request(str(number), prompt, params)
    for _ in range(7):
        llm.engine.step()
    requests = llm.engine._output_processor.resume()
    assert all(4 < len(request.output_token_ids) < 30 for request in requests)
    assert llm.stats().scheduler.drafted_tokens > 0
    llm.shutdown()
    core = build_core(llm.engine.setup)
    try:
        found = {request.request_id: list(request.output_token_ids) for request in requests}
        for request in requests:
            core.add(request)
        while core.has_unfinished:
            for output in core.step():
                found[output.request_id] += [token.token_id for token in output.tokens]
        assert list(found.values()) == expected
        assert core.stats().scheduler.accepted_tokens > 0
    finally:
        core.shutdown()


def test_two_continuations_of_one_prefix_at_once_get_their_own_tokens(engine):
    """Both hit the pages of a third request; the module's last row there is right for neither."""
    llm = engine("near", pcp=2, local_context=0, speculative="mtp:3")
    shared = prompt_of(24, 8)
    prompts = [[*shared, 1, 2, 3], [*shared, 5, 6, 7], [*shared, 50, 51, 52, 50, 51]]
    first, *others = plain(prompts)
    assert [output.outputs[0].token_ids for output in llm.generate(prompts[:1], LONG)] == [first]
    outputs = llm.generate(prompts[1:], LONG)
    assert [output.outputs[0].token_ids for output in outputs] == others
    assert [output.num_cached_tokens for output in outputs] == [24, 24]
    llm.engine.scheduler.check_integrity()
