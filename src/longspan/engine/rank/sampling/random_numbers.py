"""Counter-based random numbers: a hash of seed, position and token id, the same on every device.

It owns the hash; it must not know what is sampled with it. The kernel in `kernels.py` computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = (1 << 64) - 1
_Bits = TypeVar("_Bits", int, NDArray[Any])
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hashed(seeds: Sequence[int]) -> NDArray[np.int64]:
    """splitmix64 of R seeds, int64 [R]: computed together, because rows may change in every step."""
    return _splitmix64(np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64)).view(np.int64)


def mix(seed: int, position: int) -> int:
    """The 64-bit seed of one position: splitmix64(splitmix64(`seed`) xor `position`).

    It is hashed twice so that neighbouring seeds and positions do not give related numbers.
    """
    return _splitmix64(_splitmix64(seed & _MASK64) ^ position)


def mixed(hashes: Tensor, positions: Tensor) -> Tensor:
    """`mix` of R seeds, whose `hashed` are int64 [R], with `positions` int64 [R]."""
    return _finalised((hashes ^ positions) + _signed(GAMMA))


def uniform(starts: Tensor, ids: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), fp64 [R, K], for seeds int64 [R] that are `mixed`, and `ids` int64 [K].

    Entry [r, k] is number ids[k] of the splitmix64 sequence that begins with seed r (Steele, Lea and Flood, Fast
    Splittable Pseudorandom Number Generators, 2014), computed in wrapping 64-bit integers.
    """
    state = _finalised((ids + 1).mul_(_signed(GAMMA)) + starts[:, None])
    return _shifted(state, 11).double().add_(0.5).mul_(2.0**-53)


def seeds(values: list[int]) -> Tensor:
    """Unsigned 64-bit seeds as int64 [R] on the CPU."""
    return torch.tensor([_signed(value) for value in values])


def _finalised(state: Tensor) -> Tensor:
    """The last part of splitmix64, which turns its counter into a number."""
    state = (state ^ _shifted(state, 30)).mul_(_signed(FIRST))
    state = (state ^ _shifted(state, 27)).mul_(_signed(SECOND))
    return state ^ _shifted(state, 31)


def _splitmix64(state: _Bits) -> _Bits:
    """The number behind each counter. Arrays wrap by themselves, and integers by the masks."""
    z = (state + GAMMA) & _MASK64
    z = ((z ^ (z >> 30)) * FIRST) & _MASK64
    z = ((z ^ (z >> 27)) * SECOND) & _MASK64
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 (PyTorch's is arithmetic)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
