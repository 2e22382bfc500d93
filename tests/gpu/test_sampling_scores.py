"""The noise and probabilities of the kernels of sampling are within the bounds that their exactness rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from longspan.engine.rank.sampling.gumbel import DrawParameters, draw_plainly
from longspan.engine.rank.sampling.kernels import draw
from longspan.engine.rank.sampling.random_numbers import hashed, mixed, uniform
from longspan.engine.rank.sampling.scores import CLOSE, exponential_of, race_of, weight_of
from longspan.request import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = tl.constexpr(1024)
COUNT = 200_000 if DEVICE == "cpu" else 20_000_000
LOWEST = -41.05  # scaled logits below it are not bounded: such a token cannot be the best


@triton.jit
def exponentials(numbers, found):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found + at, exponential_of(tl.load(numbers + at).to(tl.uint64, bitcast=True)))


@triton.jit
def weights(scaled, found):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found + at, weight_of(tl.load(scaled + at)))


@triton.jit
def races(shifted, found, seed, temperature):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found + at, race_of(tl.load(shifted + at), at, tl.load(seed).to(tl.uint64, bitcast=True), temperature))


def on_device(kernel, values, dtype, *more):
    """What a kernel makes of `values`, whose number is a multiple of a block."""
    given = torch.from_numpy(values).to(DEVICE)
    found = torch.empty(len(given), dtype=dtype, device=DEVICE)
    kernel[(len(given) // BLOCK.value,)](given, found, *more)
    return found.cpu().numpy()


def whole_blocks(values):
    return np.concatenate([values, values[: -len(values) % BLOCK.value]])


def exact_exponentials(number):
    """-ln of the uniform numbers that `random_numbers.uniform` makes, with log1p where they are near 1."""
    uniforms = ((number >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    with np.errstate(divide="ignore"):
        return np.where(uniforms < 0.5, -np.log(uniforms), -np.log1p(-np.maximum(1 - uniforms, 0)))


def awkward_numbers():
    """The ends, a half, every power of two from both ends with its neighbours, and random ones at every size."""
    generator = np.random.default_rng(1)
    powers = [1 << i for i in range(53)]
    few = {0, (1 << 53) - 1, (1 << 52) - 1, 1 << 52}
    few |= {one + step for one in powers for step in (-2, -1, 0, 1, 2)}
    random = [int(generator.integers(1 << 53)) >> int(generator.integers(53)) for _ in range(COUNT // 20)]
    small = np.array([one for one in [*few, *random] if 0 <= one < 1 << 53], dtype=np.uint64)
    numbers = np.concatenate([small, np.uint64((1 << 53) - 1) - small]) << np.uint64(11)
    return whole_blocks(np.concatenate([numbers, generator.integers(1 << 64, size=COUNT, dtype=np.uint64)]))


def test_exponentials_have_the_relative_error_that_they_are_said_to_have():
    numbers = awkward_numbers()
    exact = exact_exponentials(numbers)
    found = on_device(exponentials, numbers.view(np.int64), torch.float32)
    assert exact.min() == 0 and exact.max() > 37.4
    assert np.all(np.abs(found - exact) <= 3.4e-6 * exact)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
def test_races_are_as_near_to_their_scores_as_exactness_asks(temperature):
    """Two tokens whose races are not `CLOSE` have scores in the same order, with a margin of two."""
    values = whole_blocks(np.random.default_rng(2).uniform(LOWEST, 0, COUNT)).astype(np.float32)
    shifted = values * np.float32(temperature)
    seed = mixed(torch.from_numpy(hashed([5])), torch.tensor([3]))
    found = on_device(races, shifted, torch.float32, seed.to(DEVICE), float(np.float32(temperature)))
    noise = -np.log(-np.log(uniform(seed, torch.arange(len(values)))[0].numpy()))
    scaled = shifted / np.float32(temperature)  # rounded to fp32, as scores are made of them
    error = np.abs(found * np.exp(scaled.astype(np.float64) + noise) - 1).max()
    assert error < 1.2e-5 < (CLOSE.value - 1) / 4


def test_probabilities_are_those_of_fp64_to_half_a_millionth():
    scaled = -np.random.default_rng(3).uniform(0, 45, COUNT).astype(np.float32)
    scaled = whole_blocks(np.concatenate([scaled, np.float32([0.0, -1e-30, -1e-6, -30.4, -1e4, -math.inf])]))
    found, exact = on_device(weights, scaled, torch.int64), np.exp(scaled.astype(np.float64)) * 2.0**44
    assert found[scaled == 0].tolist()[0] == 1 << 44
    assert np.all(found >= 0) and np.all(np.abs(found - exact) <= 1 + 5e-7 * exact)


NEARLY_TIED = [
    {}, {"temperature": 0.5}, {"top_p": 0.9}, {"top_p": 0.2}, {"top_k": 3}, {"top_k": 700},
    {"top_k": 40, "top_p": 0.5}, {"min_p": 0.3}, {"top_p": 0.7, "min_p": 1e-3},
]  # fmt: skip


def nearly_tied(params, vocabulary):
    """(parameters, positions, logits of a row for each of them): logits are less their noise, so scores are equal.

    They differ by rounding only, far less than races can tell.
    """
    parameters = DrawParameters.of(params, range(len(params)), torch.device("cpu"))
    positions = torch.arange(len(params))
    uniforms = uniform(mixed(parameters.hashes, positions), torch.arange(vocabulary))
    temperatures = torch.tensor([one.temperature for one in params])
    return parameters, positions, ((-uniforms.log()).log() * temperatures[:, None]).float()


def assert_drawn_as_by_plain_operations(parameters, positions, logits):
    there = DrawParameters(parameters.table.to(DEVICE), parameters.filters)
    drawn = draw(logits.to(DEVICE), there, positions.to(DEVICE))[0].tolist()
    assert drawn == draw_plainly(logits, parameters, positions)[0].tolist()
    return drawn


@pytest.mark.parametrize("vocabulary", [300, 2100])
def test_the_best_of_tokens_whose_scores_are_nearly_tied_is_that_of_fp64(vocabulary):
    assert_drawn_as_by_plain_operations(*nearly_tied([SamplingParams(**one) for one in NEARLY_TIED], vocabulary))


def test_the_best_of_tokens_of_different_blocks_whose_scores_are_nearly_tied_is_that_of_fp64():
    parameters, positions, logits = nearly_tied([SamplingParams()] * 9, 5000)
    few = torch.full_like(logits, -60.0)
    few[:, [7, 2100, 4990]] = logits[:, [7, 2100, 4990]]
    assert len(set(assert_drawn_as_by_plain_operations(parameters, positions, few))) == 3
