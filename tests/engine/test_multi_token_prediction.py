"""A model's module for multi-token prediction drafts under every layout what it drafts over the whole text."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest

from longspan import LLM, ConfigError, SamplingParams
from longspan.plan.drafts import AcceptedRow, accepted_rows
from longspan.plan.plan import Segment
from tests.drafting import ReferenceDrafts, folder_with_module
from tests.engine.conftest import THREADS
from tests.engine.drafted import GREEDY, PROMPTS, drafts_in, plain_tokens, tokens_of
from tests.oracle import prompt_of, tiny_folder
from tests.pairs import each_value, every_pair


@pytest.fixture
def drafting(engines):
    """`drafting(kind, tp=2, ...)` starts an engine on a tiny DeepSeek-V3 with a module: see `folder_with_module`."""

    def start(kind="near", folder=None, **options):
        return engines(folder or folder_of(kind, options.get("pp", 1)), **options)

    return start


def folder_of(kind, stages=1):
    return folder_with_module("deepseek-v3-deep" if stages > 1 else "deepseek-v3", kind)


@cache
def reference(kind, stages=1):
    return ReferenceDrafts(folder_of(kind, stages), 4 if stages > 1 else 2)


def plain(kind, stages=1, prompts=None, params=GREEDY, **options):
    """The tokens without drafts, of one rank."""
    return plain_tokens(folder_of(kind, stages), prompts, params, **options)


AXES = {
    "k": [1, 2, 3, 4, 5, 6, 7],
    "layout": [
        {}, {"tp": 3}, {"tp": 4, "dcp": 4}, {"tp": 4, "dcp": 2}, {"pcp": 3}, {"tp": 2, "pcp": 2, "dcp": 2},
        {"pp": 2, "tp": 2, "dcp": 2}, {"tp": 2, "pcp": 2, "enable_expert_parallel": True},
    ],
    "max_num_batched_tokens": [13, 48],
    "page_size": [1, 2, 4, 16],
    "family": ["deepseek-v3", "glm4-moe"],
    "hit": [False, True],
    "kv_cache_dtype": ["auto", "int8", "fp8_e4m3"],
}  # fmt: skip


def named(cases):
    return [pytest.param(case, id="-".join(map(str, case.values()))) for case in cases]


@pytest.mark.parametrize("case", named(each_value(AXES)))
def test_tokens_are_those_without_drafts_and_drafts_are_the_reference(drafting, case):
    check_drafts(drafting, case)


@pytest.mark.parametrize(
    ("k", "layout", "family", "kv_cache_dtype"),
    [
        (3, {"tp": 2}, "deepseek-v3", "int8"),
        (4, {"tp": 2, "pp": 2, "enable_expert_parallel": True}, "glm4-moe", "auto"),
        (2, {}, "glm4-moe", "fp8_e4m3"),
    ],
)
def test_so_they_are_where_the_device_finds_the_accepted_rows(drafting, k, layout, family, kv_cache_dtype):
    """On the only rank of a context group, with a backend that writes to slots that only the device knows."""
    common = {"max_num_batched_tokens": 13, "page_size": 1, "hit": True, "attention_backend": "torch"}
    check_drafts(
        drafting, {"k": k, "layout": layout, "family": family, "kv_cache_dtype": kv_cache_dtype, **common}, alone=True
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", named(every_pair(AXES)))
def test_every_two_choices_together(drafting, case):
    check_drafts(drafting, case)


def check_drafts(drafting, case, alone=False):
    options = {**case}
    k, family, layout, hit = (options.pop(name) for name in ("k", "family", "layout", "hit"))
    llm = drafting(
        folder=folder_with_module(family, "near"), speculative=f"mtp:{k}", local_context=0, **layout, **options
    )
    drafters = [runner.drafter for runner in llm.engine.executor.runners if runner.drafter]
    assert not alone or all(drafter.chain for drafter in drafters)
    found = drafts_in(llm)
    expected = plain_of(family, case["kv_cache_dtype"])
    assert tokens_of(llm) == expected
    if hit:
        outputs = llm.generate(PROMPTS, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert any(output.num_cached_tokens for output in outputs)
    assert any(drafts for _, drafts in found)
    if case["kv_cache_dtype"] == "auto":
        for text, drafts in found:
            assert drafts == reference_of(family).after(text, len(drafts))
    if "pcp" not in layout and k > 1:  # but behind the first, and before the last, all have their pages
        whole = [len(drafts) for text, drafts in found if len(text) not in {len(prompt) + 1 for prompt in PROMPTS}]
        assert whole.count(k) > 0.4 * len(whole)
    counters = llm.stats().scheduler
    assert 0 < counters.accepted_tokens < counters.drafted_tokens
    llm.engine.scheduler.check_integrity()


@cache
def plain_of(family, kv_cache_dtype):
    with LLM(folder_with_module(family, "near"), **{**THREADS, "kv_cache_dtype": kv_cache_dtype}) as llm:
        return tokens_of(llm)


@cache
def reference_of(family):
    return ReferenceDrafts(folder_with_module(family, "near"), 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 13},
        {"tp": 2, "dcp": 2, "local_context": 0, "page_size": 1},
        {"tp": 2, "pcp": 2, "local_context": 0, "max_num_batched_tokens": 13, "page_size": 2},
    ],
    ids=str,
)
def test_the_logits_of_random_weights_follow_the_papers_equations(drafting, options):
    llm = drafting("random", speculative="mtp:2", **options)
    found = [record_logits(runner) for runner in llm.engine.executor.runners]
    (tokens,) = tokens_of(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=1))
    assert any(found)
    for logits in found:  # of the ranks that had the sampled row
        for number, one in enumerate(logits):
            assert (one[-1] - reference("random").logits((*PROMPTS[0], *tokens), number)).abs().max() < 1e-3


def record_logits(runner):
    """The logits [rows, vocab] of each run of the module on this rank from now on."""
    module, found = runner.drafter.module, []
    head = module.head
    module.head = lambda hidden: found.append(head(hidden)) or found[-1]
    return found


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "dcp": 2, "local_context": 0}], ids=str)
def test_a_module_that_is_always_right_gives_all_its_tokens_in_every_step(drafting, layout, drafts):
    llm = drafting("right", speculative=f"mtp:{drafts}", page_size=16, **layout)
    found = drafts_in(llm)
    assert tokens_of(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=1 + 3 * (drafts + 1))) == [
        [(PROMPTS[0][-1] + n) % 97 for n in range(1, 2 + 3 * (drafts + 1))]
    ]
    counters = llm.stats().scheduler
    assert counters.accepted_tokens == counters.drafted_tokens
    lengths = [len(text) for text, _ in found]
    assert [after - before for before, after in pairwise(lengths)] == [drafts + 1] * 3


def test_a_module_that_is_always_wrong_costs_no_token(drafting):
    llm = drafting("wrong", speculative="mtp:3")
    assert tokens_of(llm) == plain("wrong")
    counters = llm.stats().scheduler
    assert counters.accepted_tokens == 0 < counters.drafted_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.5, "seed": 1, "presence_penalty": 1.0, "top_k": 5},
        {"temperature": 0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_sampled_and_penalised_tokens_are_those_without_drafts(drafting, fields):
    params = SamplingParams(max_tokens=14, **fields)
    llm = drafting(pcp=2, tp=2, dcp=2, page_size=2, local_context=0, speculative="mtp:2")
    assert tokens_of(llm, params=params) == plain("near", params=params)
    assert llm.stats().scheduler.accepted_tokens > 0


def test_preempted_requests_give_the_same_tokens(drafting):
    llm = drafting(pcp=2, pages_per_shard=(11, 11), local_context=0, speculative="mtp:3")
    batch = [*PROMPTS, PROMPTS[0][1:], PROMPTS[2][5:]]
    assert tokens_of(llm, batch) == plain("near", prompts=tuple(map(tuple, batch)))
    assert llm.stats().scheduler.preemptions > 0
    llm.engine.scheduler.check_integrity()


def test_the_modules_rows_of_a_cached_prefix_are_used_whichever_token_follows(drafting):
    """The last row of a hit belongs to one continuation: the other one finds it as it is, and gets the same tokens."""
    llm = drafting(pcp=2, local_context=0, speculative="mtp:2")
    found = drafts_in(llm)
    shared = prompt_of(24, 8)
    first, second = [*shared, 5, 6, 7], [*shared, 50, 51, 52]
    assert tokens_of(llm, [first]) == plain("near", prompts=(tuple(first),))
    assert tokens_of(llm, [second]) == plain("near", prompts=(tuple(second),))
    del found[:]
    (output,) = llm.generate([first], GREEDY)
    assert output.num_cached_tokens == 24
    assert output.outputs[0].token_ids == plain("near", prompts=(tuple(first),))[0]
    # it is the continuation that wrote the pages
    assert all(drafts == reference("near").after(text, len(drafts)) for text, drafts in found)


def test_pages_that_return_from_host_memory_bring_the_modules_rows(drafting):
    llm = drafting(pages_per_shard=(20,), page_size=4, kv_offload_memory=1 << 20, speculative="mtp:2")
    first = tokens_of(llm, PROMPTS[2:])
    tokens_of(llm, PROMPTS[:1])
    found = drafts_in(llm)
    assert tokens_of(llm, PROMPTS[2:]) == first
    assert llm.stats().offload.loaded_from_memory > 0
    assert all(drafts == reference("near").after(text, len(drafts)) for text, drafts in found)


def test_rows_behind_a_wrong_draft_are_not_accepted_on_any_rank():
    def segment(start, tokens, pcp):
        return Segment("a", start, tokens, pcp, False, 0, len(tokens))

    plan = SimpleNamespace(segments=(segment(10, (1, 2), 0), segment(12, (3,), 1), segment(13, (4, 5), 0)))
    assert accepted_rows(plan, [[2, 3, 5, 6], [4]]) == {"a": AcceptedRow(0, 3, 14)}
    assert accepted_rows(plan, [[2, 3, 9, 6], [4]]) == {"a": AcceptedRow(0, 2, 13)}
    assert accepted_rows(plan, [[2, 3, 5, 6], [9]]) == {"a": AcceptedRow(1, 0, 12)}
    assert accepted_rows(plan, [[9, 3, 5, 6], [4]]) == {"a": AcceptedRow(0, 0, 10)}


def test_the_module_takes_the_memory_of_a_layer(drafting):
    tokens = [drafting(**options).engine.setup.capacity_tokens for options in ({}, {"speculative": "mtp:4"})]
    assert abs(tokens[0] * 2 - tokens[1] * 3) <= 3 * 4


@pytest.mark.parametrize(
    ("folder", "value", "message"),
    [
        ("llama", "mtp:2", "LlamaForCausalLM has no module for multi-token prediction.*prompt-lookup:4"),
        ("deepseek-v2", "mtp:2", "num_nextn_predict_layers.*prompt-lookup:4"),
        ("deepseek-v3", "mtp:2", r"no tensors model\.layers\.2\..*use a checkpoint that has them, or --speculative"),
        ("llama", "mtp:9", r"mtp:9: unknown; use prompt-lookup:K with K in 1\.\.64, mtp:K with K in 1\.\.8, draft"),
        ("llama", "mtp", "speculative=mtp: unknown"),
    ],
)  # fmt: skip
def test_what_cannot_draft_is_refused_with_a_remedy(folder, value, message):
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_folder(folder), **{**THREADS, "speculative": value})


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "dcp": 2, "local_context": 0}], ids=str)
def test_a_module_of_glm_drafts_too(drafting, layout):
    folder = folder_with_module("glm4-moe", "right")
    llm = drafting(folder=folder, speculative="mtp:2", **layout)
    assert tokens_of(llm) == tokens_of(drafting(folder=folder))
    counters = llm.stats().scheduler
    assert counters.accepted_tokens == counters.drafted_tokens > 0
