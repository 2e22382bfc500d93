"""The kernels of sampling give the tokens of the sampler's code for one row, on every device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from longspan.engine.rank.sampling.gumbel import DrawParameters, draw_plainly
from longspan.engine.rank.sampling.rows import SampleRow, token_bits
from longspan.engine.rank.sampling.sampler import Sampler
from longspan.request import SamplingParams

pytest.importorskip("triton")

from longspan.engine.rank.sampling.kernels import draw
from tests.gpu.launches import META, counted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
SMALL = partial(draw, listed_tokens=256)  # the interpreter takes as long for an empty list as for a full one
FILTERS = [
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.8, "top_p": 1e-6},
    {"top_k": 10_000, "top_p": 0.999},
    {"temperature": 100.0, "top_p": 0.9},
    {"temperature": 1e-4, "top_k": 3},
]


def tokens(sampler, logits, rows):
    sampled = sampler.start(logits, rows).finish()
    assert not sampled.errors
    return [token.token_id for token in sampled.tokens]


def assert_same(logits, fields, listed=256):
    """Each row of `logits` under each of the parameters: the kernels against one row after the other on the CPU."""
    params = [SamplingParams(**one) for one in fields]
    rows = [SampleRow(f"{i} {j}", one, 31 * i + j, i) for i in range(len(logits)) for j, one in enumerate(params)]
    repeated = logits.repeat_interleave(len(params), 0)
    expected = tokens(Sampler(), repeated, rows)
    assert tokens(Sampler(partial(draw, listed_tokens=listed)), repeated.to(DEVICE), rows) == expected
    return expected


def normal(rows, vocabulary, spread=1.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread


def test_every_filter_over_a_vocabulary_that_is_no_multiple_of_a_block():
    assert len(set(assert_same(normal(1, 1100, 2.0), FILTERS))) > 4


def test_many_tied_logits_in_a_list_and_in_a_row_that_does_not_fit_it():
    logits = torch.randint(-6, 6, (1, 700), generator=torch.Generator().manual_seed(1)).float() / 4
    for listed in (16, 512):
        assert_same(logits, [FILTERS[2], FILTERS[3], {"top_k": 60, "top_p": 0.9}], listed)


def test_tokens_of_a_bin_that_does_not_fit_the_list():
    """Eight tokens of a bin about equally likely, so that draws show which of them are kept."""
    logits = torch.tensor([0.0, *(-1.0 - 0.0009 * i for i in range(8))])
    assert_same(logits.expand(5, -1), [{"top_k": 5}, {"top_p": 0.6}], 4)


def test_a_list_of_more_tokens_than_a_program_reads_at_once():
    """Every fifth token is one of the best, 410 in each of six blocks, and ties with the k-th are kept."""
    logits = torch.full((1, 6 * 2048), -1.0)
    logits[0, ::5] = 0.0
    drawn = assert_same(logits.expand(3, -1), [{"top_k": 50}], 8192)
    assert all(token % 5 == 0 for token in drawn) and max(drawn) > 5 * 2048


def test_equal_logits():
    assert_same(torch.zeros(1, 300), [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 1.0}, {"top_p": 1e-3, "top_k": 9}])


def test_the_lowest_ids_of_tokens_tied_at_the_edge_of_top_p_are_kept():
    """Of 20 equal tokens the first are drawn, as many as make up top-p, and no other."""
    shares = [0.05, 0.2, 0.5, 0.99] if DEVICE == "cpu" else [one / 20 for one in range(1, 20)] * 40
    rows = [SampleRow(str(i), SamplingParams(top_p=share - 0.01), i, 0) for i, share in enumerate(shares)]
    logits = torch.full((len(rows), 130), -INF)
    logits[:, 20:120:5] = 1.0
    drawn = tokens(Sampler(SMALL), logits.to(DEVICE), rows)
    assert drawn == tokens(Sampler(), logits, rows)
    assert all((token - 20) / 5 < 20 * share for token, share in zip(drawn, shares, strict=True))
    assert max(drawn) > 40


def test_logits_of_any_size_and_tokens_that_must_not_be_sampled():
    logits = normal(1, 300)
    logits[0, ::3] = -INF
    logits[0, 5], logits[0, 100], logits[0, 200] = 1e38, -1e38, 1e38
    one = torch.full((1, 300), -INF)
    one[0, 299] = -1e38
    assert_same(torch.cat((logits, one)), [{"top_p": 0.9}, {"top_k": 250}])


@pytest.mark.parametrize("vocabulary", [1, 1024])
def test_small_vocabularies_and_whole_blocks(vocabulary):
    assert_same(normal(1, vocabulary), [{"top_k": 1}, {"top_k": 2, "top_p": 0.4}])


def test_rows_that_hold_no_number_end_alone():
    logits = normal(4, 1100)
    logits[0, 1050], logits[1, 3], logits[2] = math.nan, INF, -INF
    rows = [SampleRow(str(i), SamplingParams(top_p=0.9, top_k=7), i, 0) for i in range(4)]
    sampling = Sampler(SMALL).start(logits.to(DEVICE), rows)
    sampled = sampling.finish()
    assert sorted(sampled.errors) == ["0", "1", "2"] and "maximum nan" in sampled.errors["0"]
    assert "maximum inf" in sampled.errors["1"] and "maximum -inf" in sampled.errors["2"]
    assert [token.request_id for token in sampled.tokens] == ["3"]
    assert all(0 <= token < 1100 for token in sampling.token_ids.tolist())


def test_a_best_token_that_is_not_kept_gives_way_to_one_before_it():
    """All tokens are in one bin, and few are kept: those that are tried first are not, in most rows."""
    rows = 4 if DEVICE == "cpu" else 200
    logits = -torch.rand(rows, 300, generator=torch.Generator().manual_seed(3)) / 256
    filters = [{"top_p": 0.02}, {"top_k": 4}, {"top_k": 9, "top_p": 0.4}, {"top_p": 0.9, "min_p": 0.9999}]
    drawn = assert_same(logits, filters)
    for i, row in enumerate(logits):
        order = row.argsort(descending=True).tolist()
        few = [order.index(token) for token in drawn[4 * i : 4 * i + 3]]
        assert few[0] < 7 and few[1] < 4 and few[2] < 4
        assert row[drawn[4 * i + 3]] >= row.max() + math.log(0.9999)


def test_top_p_is_of_what_top_k_keeps_where_many_tokens_are_near_the_kth():
    logits = torch.cat((-0.1 * torch.arange(10), -1.0 - 1e-5 * torch.arange(40)))
    rows = 10 if DEVICE == "cpu" else 400
    assert max(assert_same(logits.expand(rows, -1), [{"top_k": 11, "top_p": 0.8}])) < 8


def test_a_top_p_that_few_tokens_of_many_blocks_are_in():
    """Tokens are about equally likely: the best of the row is not kept, nor is the best of those before it."""
    logits = normal(3 if DEVICE == "cpu" else 100, 6200, 0.01)
    drawn = assert_same(logits, [{"top_p": 0.03}, {"top_p": 0.2}])
    kept = [int((row > row[token]).sum()) / 6200 for row, token in zip(logits, drawn[::2], strict=True)]
    assert max(kept) < 0.035


def test_narrower_logits_give_the_tokens_of_the_same_logits_in_fp32():
    logits = normal(6, 1100, 3.0).bfloat16()
    rows = [SampleRow(str(i), SamplingParams(**one), i, 0) for i, one in enumerate(FILTERS[:6])]
    assert tokens(Sampler(SMALL), logits.to(DEVICE), rows) == tokens(Sampler(), logits.float(), rows)


@pytest.mark.parametrize(
    ("params", "most"), [({"temperature": 0}, 2), ({}, 3), ({"top_p": 0.9, "top_k": 7}, 4)], ids=str
)
def test_a_batch_takes_few_launches_and_nothing_beside_them(params, most):
    parameters = DrawParameters.of([SamplingParams(**params)], [0], META) if params.get("temperature", 1) else None
    logits, positions = torch.empty(1, 128_256, dtype=torch.bfloat16, device=META), torch.empty(1, device=META)
    with counted() as launches:
        draw(logits, parameters, positions)
    assert len(launches.names) == most and all(name.endswith("_kernel") for name in launches.names)


def test_greedy_rows_alone_take_the_lowest_of_the_most_likely_tokens():
    logits = torch.zeros(3, 2050)
    logits[1, [1500, 2049]] = 2.0
    logits[2, 2049] = 1.0
    rows = [SampleRow(str(i), SamplingParams(temperature=0), i, 0) for i in range(3)]
    assert tokens(Sampler(draw), logits.to(DEVICE), rows) == [0, 1500, 2049]


@pytest.mark.slow
def test_the_kernels_fit_an_h100():
    """Compiled for it, which needs no GPU: the program that finds the winner spills a little."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.compile_sampling"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 9
    for kernel in found:
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536
        assert kernel["stack"] <= 64 * (kernel["kernel"] == "winner_kernel"), kernel
        assert kernel["waits"] == 1 and kernel["stores_before_it"] == 0, kernel


def assorted(vocabulary):
    """Rows with everything that a request may ask for."""
    draws = [{"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 30, "top_p": 0.8}, {"min_p": 0.05, "temperature": 1.4}]
    changes = [
        {}, {"logprobs": 3}, {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"logit_bias": ((4, 3.0), (vocabulary - 1, -5.0)), "logprobs": 0}, {"presence_penalty": 0.5, "logprobs": 20},
    ]  # fmt: skip
    return [
        SampleRow(
            f"{i} {j}", SamplingParams(**one, **other), 10 * i + j, 2, [1, 5, 5, 9, 9], 3, 0,
            token_bits(range(i, vocabulary, 3), vocabulary) if j == 2 else None, [9] if j == 3 else (),
        )
        for i, one in enumerate(draws)
        for j, other in enumerate(changes)
    ]  # fmt: skip


def assert_steps_are_those_of_the_cpu(sampler, vocabulary, device):
    """Three steps of the same rows; tokens of earlier steps are counted on the device."""
    reference, rows = Sampler(), assorted(vocabulary)
    for step in range(3):
        logits = normal(len(rows), vocabulary, 2.0) + step
        rows = [row._replace(position=2 + step) for row in rows]
        expected = reference.start(logits, rows).finish()
        found = sampler.start(logits.to(device), rows).finish()
        assert found.errors == expected.errors == {}
        for one, other in zip(found.tokens, expected.tokens, strict=True):
            assert (one.request_id, one.token_id) == (other.request_id, other.token_id)
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs and other.logprobs:
                assert one.logprobs.top_ids == other.logprobs.top_ids
                assert one.logprobs.sampled == pytest.approx(other.logprobs.sampled, abs=1e-4)
                assert one.logprobs.top_values == pytest.approx(other.logprobs.top_values, abs=1e-4)


def test_steps_of_a_batch_of_everything_drawn_together():
    assert_steps_are_those_of_the_cpu(Sampler(draw_plainly), 300, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [300, 49_152, 128_256])
def test_steps_on_a_gpu_are_those_on_the_cpu(vocabulary):
    assert_steps_are_those_of_the_cpu(Sampler(), vocabulary, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
def test_filters_of_a_large_vocabulary_on_a_gpu(spread, coarse):
    logits = normal(4, 128_256, spread)
    assert_same(logits.bfloat16() if coarse else logits, FILTERS, 8192)


@pytest.mark.gpu
def test_a_sampled_step_does_not_wait_for_the_device():
    """PyTorch raises where it would wait for the stream."""
    logits, sampler = torch.randn(20, 49_152, device="cuda"), Sampler()
    rows = assorted(49_152)
    sampler.start(logits, rows).finish()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampling = sampler.start(logits, [row._replace(position=3) for row in rows])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(sampling.finish().tokens) == 20
