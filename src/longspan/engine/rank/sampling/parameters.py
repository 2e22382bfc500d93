"""What sampling needs of each request's parameters, found once: the rows of a step take what is known of theirs.

It owns these numbers on the host; `gumbel.py` says what they mean on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longspan.attention.host_copy import to_device
from longspan.engine.rank.sampling.gumbel import DrawParameters, draw_table
from longspan.request import SamplingParams

_FORGET = 1024  # requests that are remembered beyond four times those of a step


@dataclass(frozen=True)
class RowParameters:
    """What is the same in every step of the same rows."""

    # how rows are drawn, on the device; None if all are greedy, or are sampled one by one
    draw: DrawParameters | None
    # rows whose logits change in every step; others do where tokens are forbidden
    changing: frozenset[int]
    # rows that want log probabilities
    described: tuple[int, ...]


class ParameterTable:
    """The parameters of all requests that are sampled on one rank."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        # rows of the arrays, by the identity of parameters, which are kept alive here, and the seed
        self._numbers: dict[tuple[int, int], int] = {}
        self._params: list[SamplingParams] = []
        # [rows, 5]: the columns of `DrawParameters.table`
        self._table = np.empty((0, 5), dtype=np.int64)
        # [rows, 2]: whether a row is drawn, and with top-k, top-p or min-p
        self._drawn = np.empty((0, 2), dtype=np.bool_)
        # rows whose logits change in every step, and those that want log probabilities: few, if any
        self._changing: set[int] = set()
        self._described: set[int] = set()

    def of(self, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | None) -> RowParameters:
        """Those of rows with these parameters and seeds. `device` is where they are drawn together; None: one by one.

        Parameters that have been seen before must be the same objects to be found again.
        """
        if len(self._params) > 4 * len(params) + _FORGET:
            self._forget()
        keys = list(zip(map(id, params), seeds, strict=True))
        numbers = [self._numbers.get(key, -1) for key in keys]
        if -1 in numbers:
            missing = [row for row, number in enumerate(numbers) if number < 0]
            self._add({keys[row]: params[row] for row in missing})
            for row in missing:
                numbers[row] = self._numbers[keys[row]]
        found = np.array(numbers, dtype=np.intp)
        drawn, filtered = map(bool, np.any(self._drawn[found], axis=0))
        draw = None
        if device is not None and drawn:
            table = np.ascontiguousarray(self._table[found].T)
            draw = DrawParameters(to_device(torch.from_numpy(table), device), filtered)
        changing, described = (
            [row for row, number in enumerate(numbers) if number in some] if some else ()
            for some in (self._changing, self._described)
        )
        return RowParameters(draw, frozenset(changing), tuple(described))

    def _add(self, new: dict[tuple[int, int], SamplingParams]) -> None:
        params = list(new.values())
        table, filtered = draw_table(params, [seed for _, seed in new])
        for number, (key, one) in enumerate(new.items(), len(self._params)):
            self._numbers[key] = number
            if one.penalises or one.logit_bias:
                self._changing.add(number)
            if one.logprobs is not None:
                self._described.add(number)
        self._params += params
        self._table = np.concatenate((self._table, table.T))
        self._drawn = np.concatenate((self._drawn, np.array((table[2] != 0, filtered)).T))
