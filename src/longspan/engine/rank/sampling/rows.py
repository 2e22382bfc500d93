"""The rows of logits that are sampled, and sets of tokens as bits.

It owns these records; it must not know how a row is sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.plan.decode import DecodeSamples
from longspan.request import SamplingParams

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM: dividing by them would overflow."""


class SampleRow(NamedTuple):
    """One row of logits to sample. A tuple, because one is made for every row of every step."""

    # the completion's id
    request_id: str
    # its sampling parameters
    params: SamplingParams
    # the completion's seed; random numbers depend on it and on `position` only
    seed: int
    # index of the wanted token in the output, from 0
    position: int
    # prompt and output so far, as far as they are known: see `KnownRequest.history`; only read if `params.penalises`
    history: Sequence[int] = ()
    # tokens of the prompt
    num_prompt: int = 0
    # how many of the tokens before the wanted one are drafts
    drafts: int = 0
    # tokens that may be sampled, as `token_bits`; None for all
    allowed: bytes | None = None
    # further tokens that may not be sampled
    banned: Sequence[int] = ()
    # why none may be sampled
    error: str = ""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.params.temperature < GREEDY_BELOW

    @property
    def prompt(self) -> Sequence[int]:
        """The prompt's tokens."""
        return self.history[: self.num_prompt]

    def output(self, first: int, stop: int) -> Sequence[int]:
        """Tokens [first, stop) of the output, as far as they are known."""
        return self.history[self.num_prompt + first : self.num_prompt + stop]


@dataclass(frozen=True)
class LateRows:
    """What only the device knows of the R rows of a batch, because drafts before them may be right."""

    # how much later each row is than its position says, int64 [R]
    shifts: Tensor
    # the tokens that the rows were computed from, int64 [R], or of a larger batch whose row number `first` is the first
    token_ids: Tensor
    # see `token_ids`
    first: int = 0

    def part(self, rows: slice) -> LateRows:
        """The same of some of the rows."""
        return LateRows(self.shifts[rows], self.token_ids, self.first + rows.start)


@dataclass(frozen=True)
class SampleRows:
    """The rows of a batch, in lists: of most rows of a decode step no `SampleRow` is ever made."""

    # the completions' ids
    names: Sequence[str]
    # their sampling parameters
    params: list[SamplingParams]
    # their seeds
    seeds: list[int]
    # indices of the wanted tokens in the outputs
    positions: Sequence[int]
    # by row, those that are not only these: with drafts, forbidden tokens, or errors
    special: Mapping[int, SampleRow]
    # where the others come from
    decode: DecodeSamples | None = None

    @staticmethod
    def of(rows: Sequence[SampleRow]) -> SampleRows:
        """Rows that have been made."""
        return SampleRows(
            [row.request_id for row in rows], [row.params for row in rows], [row.seed for row in rows],
            [row.position for row in rows], dict(enumerate(rows)),
        )  # fmt: skip

    @staticmethod
    def of_decode(samples: DecodeSamples, special: Mapping[int, SampleRow]) -> SampleRows:
        """The rows of a step that only decodes, of which some are `special`."""
        params, seeds = [known.params for known in samples.requests], [known.seed for known in samples.requests]
        for number, row in special.items():
            params[number], seeds[number] = row.params, row.seed
        return SampleRows(samples.names, params, seeds, samples.positions, special, samples)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> SampleRow:
        if self.decode is None or number in self.special:
            return self.special[number]
        known = self.decode.requests[number]
        return SampleRow(
            self.names[number], known.params, known.seed, self.positions[number], known.history, known.num_prompt
        )


def token_bits(tokens: Iterable[int], size: int) -> bytes:
    """A set of tokens below `size` as bits, the lowest token in the lowest bit of the first byte."""
    bits = bytearray(-(-size // 8))
    for token in tokens:
        bits[token >> 3] |= 1 << (token & 7)
    return bytes(bits)


def without(bits: bytes, tokens: Iterable[int]) -> bytes:
    """The set without some tokens."""
    left = bytearray(bits)
    for token in tokens:
        left[token >> 3] &= ~(1 << (token & 7))
    return bytes(left)


def both(bits: bytes, others: bytes) -> bytes:
    """The tokens that are in two sets of one size."""
    return (int.from_bytes(bits, "little") & int.from_bytes(others, "little")).to_bytes(len(bits), "little")


def every_token(size: int) -> bytes:
    """The set of all tokens below `size`."""
    return ((1 << size) - 1).to_bytes(-(-size // 8), "little")


def unpacked(bits: Tensor, size: int) -> Tensor:
    """Bool [C, size] from C sets as uint8 [C, ceil(size / 8)]."""
    powers = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return bits[:, :, None].bitwise_right_shift(powers).bitwise_and_(1).flatten(1)[:, :size].bool()
