"""Drafts under a grammar, and beside everything else that changes or ends an output, change no token."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest
import torch
from llguidance import LLMatcher

from longspan import LLM, SamplingParams
from longspan.engine.rank.sampling.grammar import Vocabulary
from longspan.engine.rank.sampling.rows import SampleRow
from longspan.engine.rank.sampling.sampler import Sampler
from longspan.request import SampledToken
from longspan.scheduler.progress import progress, right_tokens
from tests.drafting import folder_with_module
from tests.engine.conftest import THREADS
from tests.folders import shared_folder
from tests.oracle import VOCAB
from tests.server.running import ascii_tokenizer

JSON = LLMatcher.grammar_from_json_schema(
    {
        "type": "array", "minItems": 4,
        "items": {"type": "object", "properties": {"n": {"enum": [1, 20, 21]}}, "required": ["n"],
                  "additionalProperties": False},
    },
    defaults={"whitespace_pattern": ""},
)  # fmt: skip
RUNS = LLMatcher.grammar_from_regex("(abcdef|012345|[A-Z]){9,}")  # the model goes on in the alphabet, where it may
PROMPTS = ["A list: ", "[{", "0123 abc", "abcabc"]
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.9, "seed": 4, "top_p": 0.95}


@cache
def folder_of(stages: int = 1) -> str:
    """A tiny DeepSeek-V3 that reads and writes ASCII, with a module whose drafts are often right."""
    path = shared_folder("ascii-module") / "model"
    shutil.copytree(folder_with_module("deepseek-v3-deep" if stages > 1 else "deepseek-v3", "near"), path)
    ascii_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def engine(engines):
    """`engine(tp=2, ...)` starts an engine on that model."""

    def start(**options):
        return engines(folder_of(options.get("pp", 1)), **{"max_num_batched_tokens": 64, **options})

    return start


def answers(llm, params, prompts=PROMPTS):
    """Everything that a user sees."""
    outputs = [output.outputs[0] for output in llm.generate(list(prompts), list(params))]
    return [(each.token_ids, each.text, each.finish_reason, each.stop_reason) for each in outputs]


@cache
def plain(params, stages=1, copies=1):
    """The same without drafts, of one rank."""
    with LLM(folder_of(stages), **THREADS) as llm:
        return answers(llm, params, PROMPTS * copies)


def watch_drafts(llm):
    """(grammar, output before, drafts) of every request with drafts in a plan from now on."""
    scheduler, found, submit = llm.engine.scheduler, [], llm.engine.executor.submit

    def watched(plan):
        for request_id, done in progress(plan.segments).items():
            sequence = scheduler._sequences[request_id]
            if done.drafts:
                found.append((sequence.params.grammar, sequence.tokens[sequence.num_prompt :], list(done.drafts)))
        submit(plan)

    llm.engine.executor.submit = watched
    return found


def count_allowed(grammar, output, drafts):
    """How many of the drafts the grammar allows, for a matcher that has seen no other."""
    words = Vocabulary(ascii_tokenizer().backend_tokenizer.to_str, VOCAB, (VOCAB - 1,))
    return words.matcher(grammar).count_allowed(output, drafts)


MIXED = tuple(
    SamplingParams(grammar=grammar, max_tokens=24, **how) for how in (GREEDY, SAMPLED) for grammar in (JSON, RUNS)
)
LAYOUTS = [
    {"speculative": "prompt-lookup:5"},
    {"speculative": "mtp:3"},
    {"speculative": "mtp:2", "tp": 4, "dcp": 2, "local_context": 0, "page_size": 2},
    {"speculative": "prompt-lookup:7", "pcp": 3, "local_context": 0, "page_size": 2},
    {"speculative": "mtp:2", "pp": 2, "tp": 2, "pages_per_shard": (14,)},
    {"speculative": "prompt-lookup:3", "pp": 2, "pcp": 2, "pages_per_shard": (7, 7)},
    {"speculative": "mtp:3", "pcp": 2, "pages_per_shard": (7, 7), "local_context": 0},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_tokens_under_a_grammar_are_those_without_drafts(engine, options):
    llm = engine(**options)
    found = watch_drafts(llm)
    assert answers(llm, MIXED) == plain(MIXED, options.get("pp", 1))
    counters = llm.stats().scheduler
    assert counters.accepted_tokens > 0
    assert "pages_per_shard" not in options or counters.preemptions > 0
    assert found and all(count_allowed(*each) == len(each[2]) for each in found)
    llm.engine.scheduler.check_integrity()


def test_a_rank_finds_drafts_wrong_that_nobody_has_cut(engine):
    """So tokens do not depend on the scheduler's matcher."""
    llm = engine(speculative="mtp:4", pcp=2, local_context=0, page_size=2)
    llm.engine.scheduler._grammars = None
    found = watch_drafts(llm)
    assert answers(llm, MIXED) == plain(MIXED)
    assert any(count_allowed(*each) < len(each[2]) for each in found)


def test_a_grammar_that_ends_among_right_drafts_ends_the_output_there(engine):
    params = (SamplingParams(grammar=LLMatcher.grammar_from_regex("abcdefgh"), temperature=0, max_tokens=40),)
    llm = engine(speculative="mtp:4")
    ((tokens, text, reason, _),) = answers(llm, params, PROMPTS[:1])
    assert (text, str(reason), tokens[-1]) == ("abcdefgh", "stop", VOCAB - 1)
    assert llm.stats().scheduler.accepted_tokens > 0


def test_json_that_is_written_with_drafts_can_be_read(engine):
    end = ((ord("]") - 32, 4.0),)
    params = tuple(SamplingParams(grammar=JSON, seed=seed, max_tokens=99, logit_bias=end) for seed in range(4))
    llm = engine(speculative="prompt-lookup:4")
    found = answers(llm, params)
    assert found == plain(params)
    texts = [text for _, text, reason, _ in found if str(reason) == "stop"]
    assert texts and all(row["n"] in (1, 20, 21) for text in texts for row in json.loads(text))


BESIDE = tuple(
    SamplingParams(max_tokens=16, **fields)
    for fields in (
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "seed": 2, "presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"temperature": 0, "bad_word_ids": tuple((token, token + 1) for token in range(3, VOCAB, 5))},
        {"temperature": 0, "min_tokens": 9, "stop_token_ids": tuple(range(0, VOCAB, 4))},
        {"temperature": 1.2, "seed": 3, "logit_bias": tuple((token, 2.5) for token in range(30, 60))},
        {"temperature": 0, "allowed_token_ids": tuple(range(60))},
        {"temperature": 0, "stop": ["BCD", "fgh", "89"], "min_tokens": 2},
        {
            "temperature": 0.7,
            "seed": 9,
            "logprobs": 2,
            "repetition_penalty": 0.8,
            "bad_word_ids": ((40,), (41, 42, 43)),
        },
    )
)


@pytest.mark.parametrize(
    "options",
    [
        {"speculative": "mtp:3", "pcp": 2, "local_context": 0, "page_size": 2},
        {"speculative": "mtp:5", "tp": 2, "dcp": 2, "local_context": 0, "page_size": 2, "pages_per_shard": (18, 18)},
    ],
    ids=str,
)
def test_what_changes_or_ends_an_output_does_the_same_beside_drafts(engine, options):
    llm = engine(**options)
    assert answers(llm, BESIDE, PROMPTS * 2) == plain(BESIDE, copies=2)
    counters = llm.stats().scheduler
    assert counters.accepted_tokens > 0
    assert "pages_per_shard" not in options or counters.preemptions > 0


def test_a_draft_after_which_no_token_is_left_ends_no_request(engine):
    """Behind `b` each token that is allowed is the end of a bad word; the model never says `b`, but it is drafted."""
    a, b = 65, 66
    params = SamplingParams(
        temperature=0, max_tokens=6, allowed_token_ids=(a, b), bad_word_ids=((b, a), (b, b)), logit_bias=((a, 60.0),)
    )
    llm = engine(speculative="prompt-lookup:3", pcp=2, page_size=1, local_context=0)
    found = watch_drafts(llm)
    prompt = [3, a, a, b, a]
    ((tokens, *_),) = answers(llm, [params], [prompt])
    assert tokens == [a] * 6
    assert any(drafts[0] == b and len(drafts) > 1 for _, _, drafts in found)


def test_a_token_counts_only_where_all_before_it_could_be_sampled():
    tokens = [SampledToken("a", token, None, position) for position, token in ((4, 7), (5, 8), (7, 1))]
    assert [token.token_id for token in right_tokens(tokens, (7, 8, 9))] == [7, 8]
    assert right_tokens(tokens[1:], (8, 1)) == tokens[1:2]
    assert right_tokens([], (8, 1)) == []


def test_logits_that_are_no_numbers_behind_drafts_end_no_request():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0]])
    rows = [SampleRow("a", SamplingParams(temperature=0), 0, 5 + drafts, drafts=drafts) for drafts in range(3)]
    found = Sampler().start(logits, rows).finish()
    assert ([token.position for token in found.tokens], found.errors) == ([5], {})
    first = Sampler().start(logits[1:2], rows[:1]).finish()
    assert (first.tokens, list(first.errors)) == ([], ["a"])
