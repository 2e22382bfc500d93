"""The sampler: filters against a literal plain form, frequencies, batch invariance, penalties, logprobs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.cache.pages import PageTable
from longspan.engine.rank.sampling.gumbel import DrawParameters, draw_plainly
from longspan.engine.rank.sampling.logit_changes import LogitChanges, PenaltyCounts
from longspan.engine.rank.sampling.logprobs import best, most_likely
from longspan.engine.rank.sampling.random_numbers import hashed, mix, mixed, seeds, uniform
from longspan.engine.rank.sampling.rows import LateRows, SampleRow, SampleRows, token_bits
from longspan.engine.rank.sampling.sampler import Sampler, filter_tokens
from longspan.engine.rank.sampling.transfer import OneCopy
from longspan.errors import EngineError
from longspan.plan.decode import DecodeSamples
from longspan.plan.mirror import KnownRequest
from longspan.request import SampledToken, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
EDGE = 1e-5  # a plain form in fp64 may differ from fp32 when a probability falls this near to a limit


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> list[SampledToken]:
    """The tokens, of rows that can all be sampled."""
    sampled = Sampler().start(logits, rows).finish()
    assert not sampled.errors
    return sampled.tokens


def row(params: SamplingParams, seed: int = 0, position: int | None = None, **history: list[int]) -> SampleRow:
    prompt, output = history.get("prompt", []), history.get("output", [])
    return SampleRow("7", params, seed, len(output) if position is None else position, prompt + output, len(prompt))


def rows_over(varied: str, count: int, params: SamplingParams) -> list[SampleRow]:
    """Rows that differ in their seed only, or in their position only."""
    if varied == "seed":
        return [row(params, seed=i) for i in range(count)]
    return [row(params, position=i) for i in range(count)]


def tokens(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return [token.token_id for token in sample(logits, rows)]


# --- the distribution -------------------------------------------------------------------------------


def literal_filter(logits: list[float], params: SamplingParams) -> tuple[dict[int, float], float]:
    """Temperature, top-k, top-p and min-p as their definitions say, in fp64.

    Returns ({token: probability}, how near to a limit a decision was).
    """
    scaled = [logit / params.temperature for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    if 0 < params.top_k < len(logits):
        order = [i for i in order if scaled[i] >= scaled[order[params.top_k - 1]]]
    probabilities = normalised({i: math.exp(scaled[i] - max(scaled)) for i in order})
    margins = [1.0]
    if params.top_p < 1:
        nucleus: list[int] = []
        mass = 0.0
        while mass < params.top_p:
            nucleus.append(order[len(nucleus)])
            mass += probabilities[nucleus[-1]]
            margins.append(abs(mass - params.top_p))
        probabilities = normalised({i: probabilities[i] for i in nucleus})
    limit = params.min_p * max(probabilities.values())
    margins += [abs(p - limit) for p in probabilities.values() if p != limit]
    return normalised({i: p for i, p in probabilities.items() if p >= limit}), min(margins)


def normalised(weights: dict[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def distribution(logits: list[float], params: SamplingParams) -> dict[int, float]:
    ids, scaled = filter_tokens(torch.tensor(logits), params)
    allowed = range(len(logits)) if ids is None else ids.tolist()
    return dict(zip(allowed, scaled.softmax(0).tolist(), strict=True))


# Multiples of 1/4 make ties frequent; a random row seldom has one.
some_logits = st.lists(st.integers(-16, 16).map(lambda n: n / 4), min_size=1, max_size=12)
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(-1, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.01, 0.99)),
)


@settings(max_examples=300, deadline=None)
@given(some_logits, some_params)
def test_filters_leave_the_tokens_and_probabilities_of_their_definitions(
    logits: list[float], params: SamplingParams
) -> None:
    expected, margin = literal_filter(logits, params)
    assume(margin > EDGE)
    assert distribution(logits, params) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("spread", "top_p"), [(0.001, 0.8503), (1.0, 0.0201), (1.0, 0.9993), (5.0, 0.8503)], ids=str)
def test_top_p_of_a_large_vocabulary_is_exact(spread: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(4000, generator=generator) * spread).tolist()
    params = SamplingParams(top_p=top_p)
    assert distribution(logits, params) == pytest.approx(literal_filter(logits, params)[0], rel=1e-3)


def test_top_p_sorts_only_tokens_that_may_be_in_it() -> None:
    logits = torch.full((1, 20_000), -30.0)
    logits[0, :50] = 0.0
    assert sorted_sizes(logits, SamplingParams(top_p=0.9)) == [50]


def test_masked_tokens_are_never_sampled() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]]).expand(50, -1)
    drawn = tokens(logits, [row(SamplingParams(top_k=3), position=i) for i in range(50)])
    assert set(drawn) == {1, 3}


# --- randomness -------------------------------------------------------------------------------------


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    return sum((counts[k] - total * p) ** 2 / (total * p) for k, p in expected.items())


FILTERED = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.9),
    "min_p": SamplingParams(temperature=1.5, min_p=0.2),
}


@pytest.mark.parametrize(("varied", "params"), [("position", "plain"), *(("seed", name) for name in FILTERED)])
def test_sampled_frequencies_are_the_probabilities(varied: str, params: str) -> None:
    logits = [1.0, 0.0, 0.5, -1.0, 2.0, 1.5, 0.2, -0.5]
    drawn = tokens(torch.tensor(logits).expand(2000, -1), rows_over(varied, 2000, FILTERED[params]))
    counts = Counter(drawn)
    # 24.32 is the 99.9th percentile for 7 degrees of freedom; filtered rows have fewer.
    assert chi_square(counts, literal_filter(logits, FILTERED[params])[0]) < 24.32


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_neighbouring_draws_are_independent(varied: str) -> None:
    drawn = tokens(torch.zeros(3001, 4), rows_over(varied, 3001, SamplingParams()))
    pairs = Counter(itertools.pairwise(drawn))
    # 37.70 is the 99.9th percentile for 15 degrees of freedom.
    assert chi_square(pairs, dict.fromkeys(itertools.product(range(4), repeat=2), 1 / 16)) < 37.70


def test_seeds_and_positions_do_not_stand_for_each_other() -> None:
    mixed = {mix(seed, position) & 0xFFFFFFFF for seed in range(64) for position in range(64)}
    assert len(mixed) == 64 * 64


def assorted_rows(vocabulary: int) -> tuple[Tensor, list[SampleRow]]:
    generator = torch.Generator().manual_seed(3)
    params = [
        GREEDY,
        SamplingParams(logprobs=4),
        SamplingParams(temperature=0.0, logprobs=0, repetition_penalty=1.3),
        SamplingParams(top_k=20, seed=5),
        SamplingParams(top_p=0.8, logprobs=2),
        SamplingParams(top_k=50, top_p=0.5, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.3),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0, min_p=0.05),
    ]
    rows = [
        SampleRow(str(100 + i), p, seed=i * 11, position=3, history=[1, 2, i, 4, 4, i], num_prompt=3)
        for i, p in enumerate(params)
    ]
    return torch.randn(len(rows), vocabulary, generator=generator) * 3, rows


@pytest.mark.parametrize("vocabulary", [9, 1000, 5003])
def test_a_row_alone_gives_what_it_gives_in_any_batch(vocabulary: int) -> None:
    logits, rows = assorted_rows(vocabulary)
    alone: dict[int, SampledToken] = {}
    for i, one in enumerate(rows):
        alone[i] = sample(logits[i : i + 1].clone(), [one])[0]
    shuffle = random.Random(0)
    for size in (1, 3, len(rows), len(rows)):
        chosen = shuffle.sample(range(len(rows)), size)
        assert sample(logits[chosen], [rows[i] for i in chosen]) == [alone[i] for i in chosen]


def test_a_last_bit_of_difference_in_the_logits_leaves_the_tokens() -> None:
    """Ranks add in different orders; noise that went by rank in the sorted row would give other tokens."""
    logits = torch.zeros(200, 50)
    nudged = torch.nextafter(logits, torch.full_like(logits, 1.0))
    nudged[:, ::2] = 0.0
    params = SamplingParams(top_p=0.999)
    rows = [row(params, position=i) for i in range(200)]
    assert tokens(logits, rows) == tokens(nudged, rows)


def test_seeds_give_different_tokens() -> None:
    logits = torch.zeros(40, 1000)
    first, second = (tokens(logits, [row(SamplingParams(), seed, i) for i in range(40)]) for seed in (1, 2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5


# --- greedy -----------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_lowest_of_tied_tokens() -> None:
    assert tokens(torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]]), [row(GREEDY)] * 2) == [1, 0]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    params = SamplingParams(temperature=9e-6)
    logits = torch.tensor([[0.0, 1e-6, 0.0]]).expand(30, -1)
    assert tokens(logits, rows_over("seed", 30, params)) == [1] * 30


class Operations(TorchDispatchMode):
    """Records the tensor operations under it, with the size of their first operand."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0].numel() if args and isinstance(args[0], Tensor) else 0
        self.seen.append((func.overloadpacket.__name__, size))
        return func(*args, **(kwargs or {}))


def operations(logits: Tensor, rows: list[SampleRow]) -> list[tuple[str, int]]:
    with Operations() as recorded:
        sample(logits, rows)
    return recorded.seen


def sorted_sizes(logits: Tensor, params: SamplingParams) -> list[int]:
    return [size for name, size in operations(logits, [row(params)]) if name == "sort"]


def test_a_greedy_batch_takes_as_many_operations_as_one_row() -> None:
    one, many = (operations(torch.randn(n, 100), [row(GREEDY)] * n) for n in (1, 64))
    assert [name for name, _ in one] == [name for name, _ in many]


@pytest.mark.parametrize("params", [SamplingParams(top_k=20), SamplingParams(top_k=20, top_p=0.9)])
def test_top_k_never_sorts_the_vocabulary(params: SamplingParams) -> None:
    assert max(sorted_sizes(torch.randn(1, 20_000), params)) == 20


# --- penalties --------------------------------------------------------------------------------------


def changed(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """The logits of rows after bias, penalties and masks."""
    counts, upload = PenaltyCounts(), OneCopy()
    changes = LogitChanges.of(rows, range(len(rows)), counts, logits, upload)
    return changes.apply(logits, counts, upload.send(logits.device))


def penalise(logits: Tensor, one: SampleRow) -> Tensor:
    return changed(logits[None], [one])[0]


def test_repetition_penalty_shrinks_tokens_of_prompt_and_output_once() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([4.0, -4.0, 6.0, 1.0, -1.0])
    result = penalise(logits, row(params, prompt=[0, 1, 0, 0], output=[2, 0]))
    assert result.tolist() == [2.0, -8.0, 3.0, 1.0, -1.0]


def test_presence_penalty_counts_a_token_of_the_output_once() -> None:
    params = SamplingParams(presence_penalty=0.5)
    result = penalise(torch.zeros(4), row(params, prompt=[0, 1], output=[1, 1, 3]))
    assert result.tolist() == [0.0, -0.5, 0.0, -0.5]


def test_frequency_penalty_counts_every_occurrence_in_the_output() -> None:
    params = SamplingParams(frequency_penalty=0.25)
    result = penalise(torch.zeros(4), row(params, prompt=[0, 1], output=[1, 1, 3]))
    assert result.tolist() == [0.0, -0.5, 0.0, -0.25]


def literal_penalise(logits: Tensor, one: SampleRow) -> Tensor:
    """Bias, penalties and bans of one row as their definitions say, from its tokens."""
    params, result = one.params, logits.clone()
    prompt, output = list(one.prompt), list(one.output(0, one.position))
    for token, bias in params.logit_bias:
        result[token] += bias
    for token in {*prompt, *output}:
        rate = params.repetition_penalty
        result[token] = result[token] / rate if result[token] > 0 else result[token] * rate
    for token, count in Counter(output).items():
        result[token] -= params.frequency_penalty * count + params.presence_penalty
    if one.allowed is not None:
        for token in range(len(logits)):
            if not one.allowed[token >> 3] >> (token & 7) & 1:
                result[token] = -math.inf
    result[list(one.banned)] = -math.inf
    return result


def penalised_rows(vocabulary: int) -> list[SampleRow]:
    """Rows with every kind of change and mixtures of them, some with drafts, some without any change."""
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(frequency_penalty=0.4),
        SamplingParams(temperature=0.0, presence_penalty=-0.7, repetition_penalty=0.8),
        SamplingParams(logit_bias=((3, 2.5), (vocabulary - 1, -100.0))),
        SamplingParams(logit_bias=((0, 1.0),), frequency_penalty=-0.3, top_k=5),
        SamplingParams(),
    ]
    draw = random.Random(1)
    rows = []
    for number in range(24):
        history = [draw.randrange(vocabulary) // 3 for _ in range(draw.randrange(4, 40))]
        prompt = draw.randrange(1, len(history))
        position = len(history) - prompt
        allowed = token_bits(draw.sample(range(vocabulary), vocabulary // 2), vocabulary) if number % 5 == 0 else None
        rows.append(
            SampleRow(
                f"r{number}",
                params[number % 6],
                7,
                position,
                history,
                prompt,
                min(position, number % 3),
                allowed,
                [number] if number % 4 == 0 else (),
            )
        )
    return rows


@pytest.mark.parametrize("vocabulary", [64, 101])
def test_changes_of_a_batch_are_those_of_each_row(vocabulary: int) -> None:
    rows = penalised_rows(vocabulary)
    logits = torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(2)) * 3
    expected = torch.stack([literal_penalise(*pair) for pair in zip(logits, rows, strict=True)])
    torch.testing.assert_close(changed(logits, rows), expected)


def test_sampled_tokens_count_without_being_told() -> None:
    """Under async scheduling the host does not know a token before the next one is sampled."""
    params, logits = SamplingParams(temperature=0.0, frequency_penalty=1.0), torch.tensor([[3.0, 2.5, 1.9]])
    sampler = Sampler()
    found = [sampler.start(logits, [row(params, position=i)._replace(history=[2], num_prompt=1)]) for i in range(6)]
    told = []
    for _ in found:
        told += tokens(logits, [row(params, output=told)])
    assert [int(one.token_ids) for one in found] == told == [0, 1, 0, 2, 1, 0]


def test_drafts_count_for_the_rows_behind_them_only() -> None:
    params, sampler = SamplingParams(temperature=0.0, presence_penalty=2.0), Sampler()
    logits = torch.tensor([[3.0, 2.5, 1.9]]).expand(3, -1)
    drafted = [row(params, output=[0, 0])._replace(position=i, drafts=i) for i in range(3)]
    assert sampler.start(logits, drafted).token_ids.tolist() == [0, 1, 1]
    after = row(params, output=[0, 2])  # the second draft was wrong
    assert sampler.start(logits[:1], [after]).token_ids.tolist() == [1]
    assert tokens(logits[:1], [after]) == [1]


def test_where_only_the_device_knows_how_many_drafts_are_right_what_is_drawn_behind_them_counts() -> None:
    """Steps with two drafts, of which one is right, none, and both: what rows are computed from is on the device."""
    params, sampler = SamplingParams(temperature=0.0, frequency_penalty=1.0), Sampler(drafts_are_late=True)
    logits = torch.tensor([[3.0, 2.5, 1.9]]).expand(3, -1)
    begun = SampleRow("7", params, 0, 0, [2], 1)
    first = sampler.start(logits[:1], [begun])
    assert first.token_ids.tolist() == [0]
    sampler.accept(SampleRows.of([begun]), first.drawn, torch.tensor([0]))
    for row_tokens, accepted, drawn in (
        ([0, 1, 1], 1, [1, 0, 0]),  # counts of the tokens are 1 0 0 before it, then 1 1 0 and 1 2 0
        ([0, 1, 1], 0, [2, 2, 2]),  # 2 1 0, 2 2 0, 2 3 0
        ([2, 1, 0], 2, [1, 0, 2]),  # 2 1 1, 2 2 1, 3 2 1
    ):
        rows = [begun._replace(position=1 + i, drafts=i) for i in range(3)]
        made, late = SampleRows.of(rows), LateRows(torch.zeros(3, dtype=torch.int64), torch.tensor(row_tokens))
        sampling = sampler.start(logits, made, late=late)
        assert sampling.token_ids.tolist() == drawn
        sampler.accept(made, sampling.drawn, torch.tensor([accepted]))


def test_what_the_device_knows_of_many_rows_is_that_of_each_request() -> None:
    """Of 40 rows, which a CPU samples in parts, one of which begins among the rows of a request."""
    params, generator = SamplingParams(temperature=0.0, frequency_penalty=2.0), torch.Generator().manual_seed(3)
    logits, row_tokens = torch.randn(40, 9, generator=generator), torch.randint(9, (40,), generator=generator)
    shifts = torch.zeros(40, dtype=torch.int64)
    together, apart = Sampler(drafts_are_late=True), Sampler(drafts_are_late=True)
    for sampler in (together, apart):
        for number in range(8):
            begun = SampleRows.of([SampleRow(str(number), params, 0, 0, [2], 1)])
            sampler.accept(begun, sampler.start(logits[:1], begun).drawn, torch.tensor([0]))
    rows = [SampleRow(str(i // 5), params, 0, 1 + i % 5, [2], 1, i % 5) for i in range(40)]
    expected: list[int] = []
    for first in range(0, 40, 5):
        late = LateRows(shifts[:5], row_tokens[first : first + 5])
        expected += apart.start(logits[first : first + 5], rows[first : first + 5], late=late).token_ids.tolist()
    assert together.start(logits, rows, late=LateRows(shifts, row_tokens)).token_ids.tolist() == expected


def test_drafts_count_for_a_batch_as_for_one_row() -> None:
    counts, one = PenaltyCounts(), row(SamplingParams(presence_penalty=1.0), prompt=[3], output=[])
    counts.lacks(one, torch.zeros(1, 4))
    number, drafts = counts.number(one), torch.tensor([1, 1, 3])
    together = counts.of(torch.tensor([0, number]), (torch.ones_like(drafts), drafts))
    assert torch.equal(together[1], counts.of_one(number, drafts)) and together[1, 1] == 2
    assert not together[0].any()


def test_a_request_that_takes_over_an_id_begins_without_counts() -> None:
    params, logits = SamplingParams(temperature=0.0, presence_penalty=2.0), torch.tensor([[3.0, 2.5, 1.9]])
    sampler = Sampler()
    for _ in range(3):
        assert int(sampler.start(logits, [row(params)]).token_ids) == 0
        assert int(sampler.start(logits, [row(params, position=1)]).token_ids) == 1
        sampler.forget("7")


def test_tokens_that_nobody_counted_or_knows_are_an_error() -> None:
    with pytest.raises(EngineError, match=r"output tokens 0\.\.2 are neither counted nor known"):
        Sampler().start(torch.zeros(1, 3), [row(SamplingParams(presence_penalty=1.0), position=2)])


def test_penalties_come_before_the_greedy_choice() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    logits = torch.tensor([[3.0, 2.5, 0.0]])
    assert tokens(logits, [row(params, output=[])]) == [0]
    assert tokens(logits, [row(params, output=[0])]) == [1]


def test_penalties_come_before_the_filters() -> None:
    params = SamplingParams(presence_penalty=2.0, top_k=1)
    assert tokens(torch.tensor([[3.0, 2.5, 0.0]]), [row(params, output=[0])]) == [1]


def test_the_logits_passed_in_are_left_as_they_were() -> None:
    logits, rows = assorted_rows(64)
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(logits, before)


# --- log-probabilities ------------------------------------------------------------------------------


def test_logprobs_of_the_whole_vocabulary_are_sorted_and_sum_to_one() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    logprobs = sample(logits, [row(SamplingParams(logprobs=100))])[0].logprobs
    assert logprobs is not None
    assert sum(map(math.exp, logprobs.top_values)) == pytest.approx(1, abs=1e-5)
    assert list(logprobs.top_values) == sorted(logprobs.top_values, reverse=True)
    assert sorted(logprobs.top_ids) == list(range(100))


def test_logprobs_are_those_of_the_logits_before_penalties_and_temperature() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    params = SamplingParams(logprobs=2, temperature=0.2, presence_penalty=2.0, top_k=1)
    token = sample(logits, [row(params, output=[0])])[0]
    reference = logits[0].log_softmax(0)
    assert token.logprobs is not None
    assert token.token_id == 2
    assert token.logprobs.sampled == pytest.approx(float(reference[2]))
    assert token.logprobs.top_ids == (0, 2)
    assert token.logprobs.top_values == pytest.approx(reference[[0, 2]].tolist())


def test_zero_logprobs_are_the_sampled_token_alone() -> None:
    logprobs = sample(torch.zeros(1, 8), [row(SamplingParams(logprobs=0))])[0].logprobs
    assert logprobs is not None
    assert (logprobs.top_ids, logprobs.top_values) == ((), ())
    assert logprobs.sampled == pytest.approx(-math.log(8))


def test_no_logprobs_are_given_unasked() -> None:
    assert sample(torch.zeros(1, 8), [row(GREEDY)])[0].logprobs is None


def test_of_tied_alternatives_the_greedy_token_leads() -> None:
    params = dataclasses.replace(GREEDY, logprobs=2)
    token = sample(torch.zeros(1, 500), [row(params)])[0]
    assert token.logprobs is not None
    assert token.logprobs.top_ids == (token.token_id, 1) == (0, 1)


@settings(max_examples=100, deadline=None)
@given(some_logits, st.integers(1, 14))
def test_best_is_the_head_of_a_stable_sort_and_all_tied_with_its_last(values: list[float], k: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    last = values[order[min(k, len(values)) - 1]]
    assert best(torch.tensor(values), k).tolist() == [i for i in order if values[i] >= last]


# --- memory -----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the most elements that a result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, found.numel() if isinstance(found, Tensor) else 0)
        return found


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(logit_bias=((3, 2.0),), logprobs=2),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.5),
    ],
)
@pytest.mark.parametrize("others", [0, 10])
def test_what_is_made_from_the_logits_of_many_rows_is_made_for_some_at_a_time(
    params: SamplingParams, others: int
) -> None:
    logits = torch.randn(100, 500, generator=torch.Generator().manual_seed(1))
    rows = [
        row(GREEDY if i < others else params, seed=i, output=[i % 7, 3])._replace(request_id=str(i)) for i in range(100)
    ]
    with Largest() as largest:
        together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [one])[0] for i, one in enumerate(rows)]
    assert params.penalises or largest.elements <= 32 * 500  # penalties have a table of counts, of all requests


# --- what cannot be sampled -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(presence_penalty=1.0), SamplingParams(logprobs=2)]
)
def test_nan_logits_end_their_request_and_no_other(params: SamplingParams) -> None:
    logits = torch.zeros(3, 40)
    logits[1, 17] = math.nan
    rows = [row(params, output=[1] * 4)._replace(request_id=i) for i in ("50", "51", "52")]
    sampled = Sampler().start(logits, rows).finish()
    assert list(sampled.errors) == ["51"] and "at output position 4 have maximum nan" in sampled.errors["51"]
    assert [token.request_id for token in sampled.tokens] == ["50", "52"]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_row_without_a_finite_maximum_cannot_be_sampled(value: float) -> None:
    (error,) = Sampler().start(torch.full((1, 4), value), [row(GREEDY)]).finish().errors.values()
    assert f"maximum {value}" in error


def test_logits_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(EngineError, match=r"shape \(3, 4\) for 2 tokens"):
        sample(torch.zeros(3, 4), [row(GREEDY)] * 2)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 4), []) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.8, "top_p": 1e-6},
        {"temperature": 0.8, "top_k": 10_000},
    ],
    ids=str,
)
def test_rows_sampled_together_are_those_sampled_one_by_one(fields):
    """What a GPU does with a batch, against the sampler's rows; logits of few values, so that many are tied."""
    logits = torch.randint(-8, 8, (40, 300), generator=torch.Generator().manual_seed(3)).float() / 2
    params = SamplingParams(**fields)
    rows = [SampleRow(str(i), params, seed=i // 3, position=i % 3) for i in range(40)]
    expected = [token.token_id for token in sample(logits, rows)]
    found = Sampler(draw_plainly).start(logits, rows).token_ids
    assert found.tolist() == expected
    assert len(set(expected)) > 1 or "top_p" in fields


def test_a_batch_may_mix_filters():
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(temperature=t, **f)
        for t, f in ((0.5, {}), (1.0, {"top_k": 3}), (1.5, {"top_p": 0.5}), (2.0, {"min_p": 0.2}))
    ]
    rows = [SampleRow(str(i), one, seed=9, position=i) for i, one in enumerate(params)]
    found = Sampler(draw_plainly).start(logits, rows).token_ids
    assert found.tolist() == [token.token_id for token in sample(logits, rows)]


def test_noise_is_even_and_of_no_relation_to_its_neighbours():
    noise = uniform(seeds([mix(seed, 0) for seed in range(64)]), torch.arange(4096))
    assert 0 < float(noise.min()) < float(noise.max()) < 1
    counts = torch.histc(noise.float(), 16, 0, 1)
    assert ((counts - 16384).abs() < 6 * 16384**0.5).all()
    correlations = torch.corrcoef(noise)
    assert (correlations - torch.eye(64)).abs().max() < 6 / 64


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked_for():
    starts = seeds([mix(5, 7)])
    few = torch.tensor([3, 999, 3])
    assert torch.equal(uniform(starts, torch.arange(1000))[0, few], uniform(starts, few)[0])


def test_positions_mixed_on_the_device_are_those_mixed_on_the_host():
    pairs = [(0, 0), (5, 7), ((1 << 63) - 1, 1 << 40), (123456789, 3), (-4, 9), ((1 << 64) - 1, 2)]
    hashes, positions = torch.from_numpy(hashed([seed for seed, _ in pairs])), torch.tensor([at for _, at in pairs])
    assert torch.equal(mixed(hashes, positions), seeds([mix(*pair) for pair in pairs]))


def test_the_most_likely_tokens_of_a_batch_are_those_of_each_row_with_ties_by_id():
    logits = torch.randint(-3, 3, (5, 40), generator=torch.Generator().manual_seed(4)).float() / 2
    logits[0, ::2], logits[1, 7] = -math.inf, -0.0
    expected = torch.stack([best(one, 30)[:30] for one in logits])
    assert torch.equal(most_likely(logits, 30), expected)


def test_the_rows_of_a_decode_step_are_those_of_its_requests_but_for_the_ones_that_were_made():
    params = [SamplingParams(top_p=0.5), SamplingParams(top_k=3), GREEDY]
    known = [KnownRequest(PageTable(4, 1), 2, seed, each, [7, 8, 9]) for seed, each in enumerate(params)]
    made = SampleRow("b", GREEDY, 0, 5, error="no token is left")
    rows = SampleRows.of_decode(DecodeSamples(["a", "b", "c"], known, [1, 5, 9]), {1: made})
    expected = [SampleRow("a", params[0], 0, 1, [7, 8, 9], 2), made, SampleRow("c", params[2], 2, 9, [7, 8, 9], 2)]
    assert [rows[number] for number in range(3)] == expected
    whole = SampleRows.of(expected)
    assert (rows.names, rows.params, rows.seeds, rows.positions) == (
        whole.names, whole.params, whole.seeds, whole.positions,
    )  # fmt: skip


def test_parameters_on_the_device_say_which_rows_are_greedy_and_which_filters_keep_all():
    greedy = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3)
    of = [DrawParameters.of([greedy, one], [1, 2], torch.device("cpu")) for one in (
        SamplingParams(temperature=0.5), SamplingParams(temperature=0.5, min_p=0.1), SamplingParams(top_p=0.25),
        SamplingParams(top_k=7),
    )]  # fmt: skip
    assert [parameters.filters for parameters in of] == [False, True, True, True]
    plain, floor, share, few = of
    assert plain.temperature.tolist() == [0.0, 0.5]
    assert (plain.top_p.tolist(), share.top_p.tolist()) == ([0.5, 2.0], [0.5, 0.25])
    assert (plain.top_k.tolist(), few.top_k.tolist()) == ([3, 1 << 31], [3, 7])
    assert plain.floor.tolist() == [-math.inf] * 2
    assert floor.floor.tolist() == [-math.inf, pytest.approx(math.log(0.1))]
