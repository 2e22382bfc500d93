"""The order, probabilities and scores of tokens in Triton, as the kernels of `kernels.py` compute them.

It owns a row's order, the probabilities that are summed, the noise and its bound; it must not know how a row is cut
into blocks. A token is packed as its key · 2^SHIFT + its id: packed tokens are in the order in which filters keep them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.engine.rank.sampling import random_numbers

_GAMMA = tl.constexpr(random_numbers.GAMMA)
_FIRST = tl.constexpr(random_numbers.FIRST)
_SECOND = tl.constexpr(random_numbers.SECOND)
INFINITE = tl.constexpr(0x7F800000)  # the key of -inf
ALL = tl.constexpr((1 << 63) - 1)  # behind every packed token
# A race is off by less than 1.2e-5 of itself (see `race_of`), so the race of the better of two tokens is at most
# 1 + 2.4e-5 times that of the other. With room.
CLOSE = tl.constexpr(1.0 + 2.0**-14)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LN_2_HIGH = tl.constexpr(0.693145751953125)  # of 15 bits, so that its products with small integers are exact
_LN_2_LOW = tl.constexpr(1.4286068203094173e-06)
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to an integer, which is then in the lowest bits
_ONE = tl.constexpr(44 << 23)  # in the exponent: 2^44 is the integer that stands for probability 1; 2^18 fit 63 bits
_ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)


@triton.jit
def parameter(table, field, rows, row):  # type: ignore[no-untyped-def]
    """A float of a row's parameters."""
    return tl.load(table + field * rows + row).to(tl.float64, bitcast=True)


@triton.jit
def shifted_logits(logits, stride, row, ids, valid, peak):  # type: ignore[no-untyped-def]
    """Logits less the largest."""
    return tl.load(logits + row * stride + ids, mask=valid, other=float("-inf")).to(tl.float32) - peak


@triton.jit
def divided(shifted, temperature):  # type: ignore[no-untyped-def]
    """Shifted logits divided by the temperature, rounded as on the CPU."""
    if temperature != 1.0:
        shifted = tl.div_rn(shifted, tl.zeros_like(shifted) + temperature)
    return shifted


@triton.jit
def key_of(scaled):  # type: ignore[no-untyped-def]
    """Int32 that orders scaled logits, the largest first: the bits of their magnitude."""
    return scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def packed_of(scaled, ids, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens with these scaled logits, packed."""
    return (key_of(scaled).to(tl.int64) << SHIFT) | ids


@triton.jit
def scaled_of(packed, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scaled logits of packed tokens."""
    return -((packed >> SHIFT) & 0x7FFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(scaled):  # type: ignore[no-untyped-def]
    """Probabilities relative to that of the best token, as integers: within 5e-7 of themselves, and rounded down.

    2^n · 2^(r · log2 e), where scaled = n · ln 2 + r; the power of two is added to the exponent.
    """
    bounded = tl.maximum(scaled, -40.0)  # below 2^-44
    rounded = tl.fma(bounded, _LOG2_E, _ROUNDING)
    number = rounded - _ROUNDING
    rest = tl.fma(number, -_LN_2_LOW, tl.fma(number, -_LN_2_HIGH, bounded))
    power = tl.exp2(rest * _LOG2_E).to(tl.int32, bitcast=True)
    power += (rounded.to(tl.int32, bitcast=True) << 23) + _ONE
    return power.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def seed_of(table, positions, row):  # type: ignore[no-untyped-def]
    """The seed of a row at its position: see `random_numbers.mixed`."""
    return _finalised((tl.load(table + row) ^ tl.load(positions + row)).to(tl.uint64, bitcast=True) + _GAMMA)


@triton.jit
def score_of(scaled, ids, seed):  # type: ignore[no-untyped-def]
    """Scaled logits with the noise of their tokens, fp64: see `random_numbers.uniform`."""
    uniform = ((_hash(ids, seed) >> 11).to(tl.float64) + 0.5) * (1.0 / (1 << 53))
    return scaled.to(tl.float64) - tl.log(-tl.log(uniform))


@triton.jit
def race_of(shifted, ids, seed, temperature):  # type: ignore[no-untyped-def]
    """About exp(-score), fp32, as in an exponential race: the token with the smallest has the best score.

    Its relative error is below 1.2e-5 where scaled logits are above -41.05. A token below that loses to the most likely
    one: noise is -ln(54 · ln 2) = -3.62 at least, and 52 · ln 2 = 36.05 at most unless it is infinite, as for one of
    2^53 numbers. The exponent is at most 59.3 and off by 1.33e-7 of itself, and the scaled logits are rounded to
    2^-24 of themselves: 7.9e-6 together. `exp2` is off by 2.4e-7, `exponential_of` by 3.4e-6, their product by 6e-8.
    """
    factor = tl.div_rn(tl.full((), -_LOG2_E, tl.float32), temperature)
    return exponential_of(_hash(ids, seed)) * tl.exp2(shifted * factor)


@triton.jit
def exponential_of(number):  # type: ignore[no-untyped-def]
    """-ln(u), fp32, for u = (n + 1/2) · 2^-53, where n are the upper 53 bits of `number`; off by less than 3.4e-6.

    Below a half that is a logarithm: above 0.69, and off by 1.5e-6 and roundings below 8e-7. Above it 1 - u = w is
    converted from an integer of its own, so that it has all bits of fp32 however small it is, and
    -ln(u) = w · (1 + w/2 + w²/3 ...) is w times a polynomial, off by 1e-6 and roundings below 4e-7. There fp64 rounds
    n + 1/2 to an even integer, and so does this: 0 if n has 53 ones, as the score is infinite.
    """
    signed = number.to(tl.int64, bitcast=True)
    upper = signed < 0
    count = (signed ^ (signed >> 63)) >> 11  # n, or 2^53 - 1 - n
    rest = tl.where(upper, tl.where((count & 1) == 1, 1.0, 0.0), 0.5)
    part = (count.to(tl.float32) + rest) * 2.0**-53
    above = 0.9905819892883301
    above = above * part - 0.6379215121269226
    above = above * part + 0.5227451324462891
    above = above * part + 0.18753239512443542
    above = above * part + 0.3389110267162323
    above = above * part + 0.49981674551963806
    above = above * part + 1.0000009536743164
    return tl.where(upper, part * above, -_logarithm(part))


@triton.jit
def _logarithm(value):  # type: ignore[no-untyped-def]
    """The natural logarithm of positive normal numbers, within 1.5e-6 and fp32's roundings."""
    bits = value.to(tl.int32, bitcast=True) - _ROOT_HALF
    rest = ((bits & 0x7FFFFF) + _ROOT_HALF).to(tl.float32, bitcast=True) - 1.0
    found = -0.14320780336856842
    found = found * rest + 0.22329246997833252
    found = found * rest - 0.2547203004360199
    found = found * rest + 0.3322598934173584
    found = found * rest - 0.4998508095741272
    found = found * rest + 1.000012755393982
    return (bits >> 23).to(tl.float32) * _LN_2 + found * rest


@triton.jit
def _hash(ids, seed):  # type: ignore[no-untyped-def]
    """The 64-bit number of each token."""
    return _finalised((ids + 1).to(tl.uint64) * _GAMMA + seed)


@triton.jit
def _finalised(state):  # type: ignore[no-untyped-def]
    """See `random_numbers`: shifts of unsigned integers are logical, and products wrap."""
    state = (state ^ (state >> 30)) * _FIRST
    state = (state ^ (state >> 27)) * _SECOND
    return state ^ (state >> 31)
