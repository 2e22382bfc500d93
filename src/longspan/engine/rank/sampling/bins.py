"""Keys, bins and scores of tokens in Triton, as the kernels of `kernels.py` compute them.

It owns the order of a row's tokens, the probabilities that are summed, and the noise; it must not know how a row is cut
into blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.rank.sampling import random_numbers

BINS = tl.constexpr(2048)  # bins of a row, of which the last few are not used
_GAMMA = tl.constexpr(random_numbers.GAMMA)
_FIRST = tl.constexpr(random_numbers.FIRST)
_SECOND = tl.constexpr(random_numbers.SECOND)
_ONE = tl.constexpr(float(1 << 44))  # the integer that stands for probability 1: 2^18 of them fit into 63 bits
INFINITE = tl.constexpr(0x7F800000)  # the key of -inf
# Bins are 1/128 of an octave wide for logits that are 2^-8 to 2^7 below the largest, and whole octaves below these.
_LOW = tl.constexpr((127 - 8) << 7)
_HIGH = tl.constexpr((127 + 7) << 7)
_FINE = tl.constexpr(1921)  # the first bin of a whole octave


@triton.jit
def parameter(table, field, rows, row):  # type: ignore[no-untyped-def]
    """A float of a row's parameters."""
    return tl.load(table + field * rows + row).to(tl.float64, bitcast=True)


@triton.jit
def scaled_logits(logits, stride, row, ids, valid, peak, temperature):  # type: ignore[no-untyped-def]
    """Logits shifted so that the largest is 0, and divided by the temperature: rounded as on the CPU."""
    values = tl.load(logits + row * stride + ids, mask=valid, other=float("-inf")).to(tl.float32)
    return tl.div_rn(values - peak, tl.zeros_like(values) + temperature)


@triton.jit
def key_of(scaled):  # type: ignore[no-untyped-def]
    """Int64 that orders scaled logits, the largest first: the bits of their magnitude."""
    return (scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)


@triton.jit
def weight_of(key):  # type: ignore[no-untyped-def]
    """The probability relative to that of the best token, as an integer."""
    scaled = -key.to(tl.int32).to(tl.float32, bitcast=True)
    return (tl.exp(scaled.to(tl.float64)) * _ONE).to(tl.int64)


@triton.jit
def bin_of(key):  # type: ignore[no-untyped-def]
    """The number of the bin of a key."""
    prefix = (key >> 16).to(tl.int32)
    fine = tl.maximum(prefix - _LOW + 1, 0)
    return tl.where(prefix < _HIGH, fine, _FINE + ((prefix - _HIGH) >> 7))


@triton.jit
def first_key(number):  # type: ignore[no-untyped-def]
    """The first key of a bin."""
    prefix = tl.where(number <= _FINE, _LOW + number - 1, _HIGH + (number - _FINE) * 128)
    return tl.where(number <= 0, 0, prefix.to(tl.int64) << 16)


@triton.jit
def place_of(number):  # type: ignore[no-untyped-def]
    """Where a bin is: neighbours, to which most of a row is added, are in different cache lines."""
    return (number & 127) * 16 + (number >> 7)


@triton.jit
def score_of(scaled, ids, table, positions, row):  # type: ignore[no-untyped-def]
    """Scaled logits with the noise of their tokens, fp64: see `random_numbers.uniform`."""
    seed = (tl.load(table + row) ^ tl.load(positions + row)).to(tl.uint64, bitcast=True)
    start = _finalised(seed + _GAMMA)
    number = _finalised((ids + 1).to(tl.uint64) * _GAMMA + start)
    uniform = ((number >> 11).to(tl.float64) + 0.5) * (1.0 / (1 << 53))
    return scaled.to(tl.float64) - tl.log(-tl.log(uniform))


@triton.jit
def _finalised(state):  # type: ignore[no-untyped-def]
    """See `random_numbers`: shifts of unsigned integers are logical, and products wrap."""
    state = (state ^ (state >> 30)) * _FIRST
    state = (state ^ (state >> 27)) * _SECOND
    return state ^ (state >> 31)
