"""What a request may ask for, and what it gets: limits, batches, n, seeds, streams, aborts, refusals."""

import itertools

import numpy as np
import pytest

from longspan import ContextOverflow, FinishReason, RequestError, SamplingParams, WorkerDied
from tests.oracle import VOCAB, greedy, oracle, prompt_of

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def tokens(output, index=0):
    return output.outputs[index].token_ids


def test_zero_tokens_finish_at_once_without_a_step(tiny):
    (output,) = tiny().generate(prompt_of(5), SamplingParams(max_tokens=0))
    assert (tokens(output), output.outputs[0].finish_reason) == ([], FinishReason.LENGTH)


def test_one_token_comes_from_the_prefill_alone(tiny):
    (output,) = tiny(pcp=2).generate(prompt_of(33), SamplingParams(temperature=0, max_tokens=1))
    assert tokens(output) == greedy(oracle("llama"), prompt_of(33), 1)[0]


def test_no_limit_runs_until_the_context_is_full(tiny):
    (output,) = tiny(max_model_len=40).generate(prompt_of(30), SamplingParams(temperature=0, max_tokens=None))
    assert len(tokens(output)) == 10


def test_a_stop_token_ends_the_completion_and_is_kept(tiny):
    whole = greedy(oracle("llama"), prompt_of(5), 6)[0]
    stop = next(token for token in whole[1:] if token != whole[0])
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[stop])
    (output,) = tiny().generate(prompt_of(5), params)
    assert tokens(output) == whole[: whole.index(stop) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_n_completions_share_the_prompts_pages_and_differ_by_seed(tiny, prefix_caching):
    llm = tiny(pcp=2, enable_prefix_caching=prefix_caching)
    (output,) = llm.generate(prompt_of(33), SamplingParams(n=4, temperature=1.0, max_tokens=6, seed=5))
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1
    assert all(len(c.token_ids) == 6 for c in output.outputs)
    apart = 4 * -(-(33 + 6) // 4)
    used = sum(llm.stats().peak_pages_per_shard)
    assert used < apart if prefix_caching else used >= apart - 4


@pytest.mark.parametrize("layout", [{}, {"pcp": 3}, {"tp": 4, "dcp": 2}, {"max_num_batched_tokens": 11}])
def test_a_seed_fixes_the_tokens_however_the_request_is_run(tiny, layout):
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=12, seed=42)
    alone = tokens(tiny().generate(prompt_of(16), params)[0])
    others = [prompt_of(length, seed=3) for length in (3, 40)]
    outputs = tiny(**layout).generate([others[0], prompt_of(16), others[1]], params)
    assert tokens(outputs[1]) == alone


def test_requests_without_a_seed_differ(tiny):
    outputs = tiny().generate([prompt_of(5)] * 3, SamplingParams(temperature=2.0, max_tokens=12))
    assert len({tuple(tokens(output)) for output in outputs}) == 3


@pytest.mark.parametrize("layout", [{}, {"pcp": 2, "tp": 2}])
def test_penalties_see_prompt_and_output_on_every_layout(tiny, layout):
    prompt = prompt_of(16)
    params = SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1e6)
    found = tokens(tiny(**layout).generate(prompt, params)[0])
    assert len(set(found)) == 20
    assert not set(found) & set(prompt)


def test_penalised_tokens_survive_preemption(tiny):
    params = SamplingParams(temperature=0, max_tokens=30, presence_penalty=1.5, frequency_penalty=0.5)
    batch = [prompt_of(16, seed) for seed in range(4)]
    roomy, tight = tiny(pcp=2), tiny(pcp=2, pages_per_shard=(10, 8))
    expected = [tokens(output) for output in roomy.generate(batch, params)]
    assert [tokens(output) for output in tight.generate(batch, params)] == expected
    assert tight.stats().scheduler.preemptions > 0


def test_streaming_yields_growing_outputs_and_ends_finished(tiny):
    seen = [list(tokens(output)) for output in tiny(pcp=2).stream(prompt_of(33), GREEDY)]
    assert seen[-1] == greedy(oracle("llama"), prompt_of(33), 6)[0]
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(seen))


def test_leaving_a_stream_frees_its_pages(tiny):
    llm = tiny(pcp=2)
    for _ in llm.stream(prompt_of(33), SamplingParams(temperature=0, max_tokens=100)):
        break
    assert sum(llm.stats().used_pages_per_shard) == 0
    assert tokens(llm.generate(prompt_of(33), GREEDY)[0]) == greedy(oracle("llama"), prompt_of(33), 6)[0]


def test_a_batch_may_run_while_a_stream_is_open(tiny):
    llm = tiny(pcp=2)
    stream = llm.stream(prompt_of(33), GREEDY)
    next(stream)
    assert tokens(llm.generate(prompt_of(5), GREEDY)[0]) == greedy(oracle("llama"), prompt_of(5), 6)[0]
    assert tokens(list(stream)[-1]) == greedy(oracle("llama"), prompt_of(33), 6)[0]


def test_an_aborted_request_leaves_the_shared_pages_of_another_alone(tiny):
    llm = tiny(pcp=2)
    prompt, expected = prompt_of(33), greedy(oracle("llama"), prompt_of(33), 20)[0]
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1))
    llm.engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=20))
    llm.engine.add_request("b", prompt, SamplingParams(temperature=0, max_tokens=20))
    for _ in range(4):
        llm.engine.step()
    llm.engine.abort("a")
    outputs = []
    while llm.engine.has_unfinished:
        outputs += [output for output in llm.engine.step() if output.finished]
    by_id = {output.request_id: output for output in outputs}
    assert by_id["a"].outputs[0].finish_reason == FinishReason.ABORT
    assert tokens(by_id["b"]) == expected


def test_a_short_prompt_passes_a_long_one(tiny):
    llm = tiny(max_num_batched_tokens=16)
    llm.engine.add_request("long", prompt_of(200), SamplingParams(temperature=0, max_tokens=1))
    llm.engine.step()
    llm.engine.add_request("short", prompt_of(5), SamplingParams(temperature=0, max_tokens=1))
    done = []
    while llm.engine.has_unfinished:
        done += [output.request_id for output in llm.engine.step() if output.finished]
    assert done == ["short", "long"]


def test_a_long_prefill_does_not_starve_a_decode(tiny):
    llm = tiny(max_num_batched_tokens=16)
    llm.engine.add_request("decoding", prompt_of(5), SamplingParams(temperature=0, max_tokens=100))
    llm.engine.step()
    llm.engine.add_request("long", prompt_of(200), SamplingParams(temperature=0, max_tokens=1))
    before = llm.engine.progress("long")[0]
    for expected in range(2, 8):
        (output,) = (o for o in llm.engine.step() if o.request_id == "decoding")
        assert len(tokens(output)) == expected
    assert llm.engine.progress("long")[0] > before


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(tiny):
    llm = tiny(pages_per_shard=(5,))
    with pytest.raises(ContextOverflow, match=r"30 prompt tokens and max_tokens=6 exceed the 21 tokens.*lower max"):
        llm.generate(prompt_of(30), GREEDY)


def test_a_refused_prompt_does_not_hold_up_the_engine(tiny):
    llm = tiny()
    with pytest.raises(RequestError, match="empty"):
        llm.generate([prompt_of(5), []], GREEDY)
    assert tokens(llm.generate(prompt_of(5), GREEDY)[0]) == greedy(oracle("llama"), prompt_of(5), 6)[0]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused(tiny, token):
    with pytest.raises(RequestError, match=rf"prompt_token_ids={token}"):
        tiny().generate([3, token], GREEDY)


def test_text_without_a_tokenizer_is_refused(tiny):
    with pytest.raises(RequestError, match="no tokenizer"):
        tiny().generate("hello", GREEDY)


def test_stop_strings_without_a_tokenizer_are_refused(tiny):
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        tiny().generate(prompt_of(3), SamplingParams(stop="x"))


def test_reported_pages_are_the_pages_in_use(tiny):
    llm = tiny(pcp=2)
    llm.engine.add_request("a", prompt_of(33), SamplingParams(temperature=0, max_tokens=20))
    for _ in range(5):
        llm.engine.step()
    by_shard = [sum(page.shard == shard for page in llm.engine.pages("a")) for shard in range(2)]
    assert tuple(by_shard) == llm.stats().used_pages_per_shard
    assert sum(by_shard) == -(-(33 + 4) // 4)


def test_local_requests_share_a_prefix_that_lies_on_two_shards(tiny):
    llm = tiny(pcp=2, schedule="local")
    shared = prompt_of(40)
    prompts = [[*shared, *end] for end in ([1], [2], [3, 4])]
    for _ in range(2):
        outputs = llm.generate([*prompts, prompt_of(3)], GREEDY)
        for prompt, output in zip([*prompts, prompt_of(3)], outputs, strict=True):
            assert tokens(output) == greedy(oracle("llama"), prompt, 6)[0]


def test_a_local_request_is_placed_where_it_can_grow(tiny):
    llm = tiny(pcp=2, schedule="local", pages_per_shard=(4, 40))
    llm.generate(prompt_of(9), SamplingParams(temperature=0, max_tokens=1))
    (output,) = llm.generate(prompt_of(9) + prompt_of(51), SamplingParams(temperature=0, max_tokens=6))
    assert tokens(output) == greedy(oracle("llama"), prompt_of(9) + prompt_of(51), 6)[0]
    (output,) = llm.generate(prompt_of(9), SamplingParams(temperature=0, max_tokens=40))
    assert tokens(output) == greedy(oracle("llama"), prompt_of(9), 40)[0]


def interrupt(llm, owner, name, monkeypatch):
    """Interrupt a generation where `owner.name` is called; later ones must not get its tokens."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt_of(16), GREEDY)
    monkeypatch.undo()
    with pytest.raises(WorkerDied, match="start the engine again"):
        llm.generate(prompt_of(16), GREEDY)


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_an_interrupted_step_ends_the_engine_rather_than_giving_stale_tokens(tiny, executor, monkeypatch):
    llm = tiny(pcp=2, executor=executor)
    interrupt(llm, llm.engine.executor, "collect", monkeypatch)


@pytest.mark.parametrize("place", ["scheduler.commit", "_record"])
def test_an_interrupt_between_steps_ends_the_engine_too(tiny, place, monkeypatch):
    llm = tiny(pcp=2)
    owner, name = (llm.engine.scheduler, "commit") if "." in place else (llm.engine.core, place)
    interrupt(llm, owner, name, monkeypatch)


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_any_integers_are_token_ids(tiny, executor):
    llm = tiny(executor=executor)
    expected = greedy(oracle("llama"), prompt_of(5), 6)[0]
    assert tokens(llm.generate(np.array(prompt_of(5)), GREEDY)[0]) == expected
    with pytest.raises(RequestError, match="are not integers"):
        llm.generate([[1.5]], GREEDY)
    assert tokens(llm.generate(prompt_of(5), GREEDY)[0]) == expected


def test_a_batch_with_a_prompt_of_no_kind_leaves_nothing_behind(tiny):
    llm = tiny()
    with pytest.raises(TypeError):
        llm.generate([prompt_of(5), None], GREEDY)
    llm.generate(prompt_of(5), GREEDY)
    assert not llm.engine.has_unfinished


def test_cached_tokens_are_those_of_the_first_admission(tiny):
    llm = tiny(pcp=2, pages_per_shard=(10, 8))
    outputs = llm.generate([prompt_of(16, seed) for seed in range(4)], SamplingParams(temperature=0, max_tokens=30))
    assert llm.stats().scheduler.preemptions > 0
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1, "seed": 3, "top_p": 0.9, "logprobs": 1}], ids=str
)
def test_a_request_whose_logits_are_no_numbers_ends_and_the_others_go_on(tiny, params):
    """As an activation that overflows makes them: here the embedding of one token is not a number."""
    llm = tiny(pcp=2)
    good = [prompt_of(20), prompt_of(31, 5)]
    expected = [o.outputs[0].token_ids for o in llm.generate(good, SamplingParams(max_tokens=6, **params))]
    known = {token for tokens in (*good, *expected) for token in tokens}
    bad = next(token for token in range(100) if token not in known)
    for runner in llm.engine.executor.runners:
        embed = runner.model.embedding
        runner.model.embedding = lambda ids, embed=embed: embed(ids).masked_fill((ids == bad)[:, None], float("nan"))
    together = llm.generate([good[0], [3, 4, bad, 5], good[1]], SamplingParams(max_tokens=6, **params))
    assert [o.outputs[0].finish_reason for o in together] == ["length", "error", "length"]
    assert [together[0].outputs[0].token_ids, together[2].outputs[0].token_ids] == expected


def test_a_cached_prefix_is_found_by_requests_of_the_same_salt_only(tiny):
    """Otherwise a tenant could learn from its speed, or from `cached_tokens`, what another one has sent."""
    llm = tiny(pcp=2)
    prompt = prompt_of(40)

    def cached(salt):
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4, cache_salt=salt))
        assert output.outputs[0].token_ids == greedy(oracle("llama"), prompt, 4)[0]
        return output.num_cached_tokens

    assert [cached("mine"), cached("yours"), cached(""), cached("mine"), cached("")] == [0, 0, 0, 36, 36]
