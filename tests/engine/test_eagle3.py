"""An EAGLE-3 module drafts under every layout what the paper's equations give over the whole text."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from longspan import ConfigError, ModelError, SamplingParams
from tests.drafting import DRAFT_VOCAB, ReferenceEagle3, changed_folder, eagle3_folder, predictable_folder
from tests.engine.drafted import GREEDY, PROMPTS, drafts_in, named, plain_tokens, start, tokens_of
from tests.oracle import VOCAB, prompt_of, tiny_folder
from tests.pairs import every_pair


def target(name="llama-seven"):
    return predictable_folder(name)


@pytest.fixture
def drafting(engines):
    """`drafting("near:3", tp=2, ...)` starts an engine for which a tiny module drafts 3 tokens."""

    def begin(drafts, name="llama-seven", **options):
        kind, _, count = drafts.partition(":")
        return engines(target(name), speculative=f"eagle3:{count}:{eagle3_folder(kind)}", **options)

    return begin


def plain(name="llama-seven", prompts=None, params=GREEDY, **options):
    """The tokens without drafts, of one rank."""
    return plain_tokens(target(name), prompts, params, **options)


@cache
def reference(kind="near", name="llama-seven", **fields):
    return ReferenceEagle3(target(name), eagle3_folder(kind, **fields))


QUICK = [{"drafts": "near:3", "layout": {"tp": 2, "dcp": 2}, "page_size": 1, "chunk": 23}]
AXES = {
    "drafts": ["near:1", "near:2", "near:4", "near:8"],
    "name": ["llama-seven", "qwen3-seven"],
    "layout": [
        {}, {"tp": 3}, {"tp": 4, "dcp": 4, "schedule": "gather_kv"}, {"tp": 4, "dcp": 2}, {"pcp": 3},
        {"tp": 2, "pcp": 2, "dcp": 2, "schedule": "ring_kv"}, {"pcp": 2, "schedule": "ring_q"},
    ],
    "page_size": [1, 2, 4, 16],
    "chunk": [13, 48],
    "hit": [False, True],
    "kv_cache_dtype": ["auto", "int8", "fp8_e4m3"],
}  # fmt: skip


@pytest.mark.parametrize("case", named(QUICK))
def test_tokens_are_those_without_drafts_and_drafts_are_the_reference(drafting, case):
    check(drafting, **case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", named(every_pair(AXES)))
def test_every_two_choices_together(drafting, case):
    check(drafting, **case)


def check(drafting, drafts, layout, name="llama-seven", page_size=4, chunk=48, hit=False, kv_cache_dtype="auto"):
    llm = drafting(
        drafts, name, **layout, local_context=0, page_size=page_size, max_num_batched_tokens=chunk,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    found = drafts_in(llm)
    expected = plain(name, kv_cache_dtype=kv_cache_dtype)
    assert tokens_of(llm) == expected
    if hit:
        outputs = llm.generate(PROMPTS, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert any(output.num_cached_tokens for output in outputs)
    assert any(after for _, after in found)
    if kv_cache_dtype == "auto":
        for text, after in found:
            assert after == reference("near", name).after(text, len(after))
    assert llm.stats().scheduler.accepted_tokens > 0
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"tp": 2, "pcp": 2, "local_context": 0, "max_num_batched_tokens": 13}),
        ({"layer": "layers.0", "norm_before_residual": True}, {}),
    ],
    ids=str,
)
def test_the_logits_of_random_weights_follow_the_papers_equations(fields, options):
    folder = eagle3_folder("random", **fields)
    with start(target(), speculative=f"eagle3:2:{folder}", **options) as llm:
        found = [record_logits(runner) for runner in llm.engine.executor.runners]
        (tokens,) = tokens_of(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=1))
    assert any(found)
    for logits in found:  # of the ranks that had the sampled row
        for number, one in enumerate(logits):
            expected = reference("random", **fields).logits((*PROMPTS[0], *tokens), number)
            known = expected > -torch.inf
            assert int(known.sum()) == DRAFT_VOCAB
            assert (one[-1][~known] == -torch.inf).all()
            assert (one[-1][known] - expected[known]).abs().max() < 1e-3


def record_logits(runner):
    """The logits [rows, vocab] of each run of the module on this rank from now on."""
    module, found = runner.drafter.module, []
    head = module.head
    module.head = lambda hidden: found.append(head(hidden)) or found[-1]
    return found


def test_sampled_tokens_over_a_quantised_cache_are_those_without_drafts(drafting):
    params = SamplingParams(max_tokens=14, temperature=0.8, seed=5)
    llm = drafting("near:2", pcp=2, local_context=0, page_size=2, kv_cache_dtype="fp8_e4m3")
    assert tokens_of(llm, params=params) == plain(params=params, kv_cache_dtype="fp8_e4m3")
    assert llm.stats().scheduler.accepted_tokens > 0


def test_two_continuations_of_a_cached_prefix_get_their_tokens(drafting):
    llm = drafting("near:1")
    shared = prompt_of(24, 8)
    for prompt in ([*shared, 5, 6, 7], [*shared, 50, 51, 52], [*shared, 5, 6, 7]):
        (output,) = llm.generate([prompt], GREEDY)
        assert output.outputs[0].token_ids == plain(prompts=(tuple(prompt),))[0]
    assert output.num_cached_tokens == 24


def test_its_layer_is_counted_in_the_capacity_by_its_own_bytes(drafting):
    bytes_of_a_token = 7 * 2 * 4 * 4 * 4 + 2 * 2 * 8 * 4  # layers, keys and values, KV heads, elements, bytes
    assert drafting("near:1").engine.setup.capacity_tokens == (1 << 20) // (bytes_of_a_token * 4) * 4


def wrong(change=None, **fields):
    """A module with tensors or fields that do not fit."""
    return changed_folder(eagle3_folder(), change or (lambda weights: None), fields)


REFUSED = {
    "two rows": (
        lambda: wrong(lambda w: w.update({"fc.weight": torch.zeros(48, 2 * 48)})),
        {}, "fc.weight takes 96 elements, and three rows of the model have 144; use the module that was made for this",
    ),
    "a mask of another vocabulary": (
        lambda: wrong(lambda w: w.update(t2d=torch.zeros(VOCAB - 1, dtype=torch.bool))),
        {}, r"t2d has shape \(96,\), and the model's vocabulary 97 tokens; use the module",
    ),
    "offsets out of the vocabulary": (
        lambda: wrong(lambda w: w.update(d2t=w["d2t"] + 50)),
        {}, r"d2t leads to tokens \d+ to 1\d\d, and the model has 97",
    ),
    "another vocabulary": (
        lambda: wrong(vocab_size=103), {}, "made for a vocabulary of 103 tokens, and the model's has 97",
    ),
    "two layers": (
        lambda: wrong(num_hidden_layers=2), {}, "num_hidden_layers=2 is not supported; use a module of one layer",
    ),
    "other layers of the model": (
        lambda: wrong(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 5]}),
        {}, r"layer_ids=\[0, 1, 5\] is not supported .* what enters layers \[2, 3, 4\]",
    ),
    "a missing tensor": (
        lambda: wrong(lambda w: w.pop("norm.weight")), {}, "norm.weight: missing from the checkpoint",
    ),
    "another width without an embedding": (
        lambda: wrong(hidden_size=24, target_hidden_size=48),
        {}, "no embedding, and its width of 24 is not the model's 48; use a module with an embedding of its own",
    ),
    "pipeline stages": (
        eagle3_folder, {"pp": 2}, "layers that are on different pipeline stages; use draft:K:MODEL, or leave out",
    ),
    "heads that do not divide": (
        eagle3_folder, {"tp": 8}, "tensor_parallel_size=8 must divide its own 12 query heads; use one of 1, 2, 3, 4",
    ),
    "a model of few layers": (
        eagle3_folder, {"name": "llama-deep"}, "LlamaForCausalLM with 4 layers does not give the hidden states of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_draft_is_refused_with_a_remedy(case):
    folder, options, message = REFUSED[case]
    named = {"name": "llama-seven", **options}
    with pytest.raises((ConfigError, ModelError), match=message):
        start(tiny_folder(named.pop("name")), speculative=f"eagle3:2:{folder()}", **named)


@pytest.mark.parametrize("named", [[2, 3, 4], [1, 2, 3]])
def test_layers_that_are_named_as_inputs_or_as_outputs_are_taken_the_same(named):
    folder = wrong(eagle_aux_hidden_state_layer_ids=named)
    with start(target(), speculative=f"eagle3:1:{folder}") as llm:
        assert llm.engine.setup.model.observed_layers == (2, 3, 4)
