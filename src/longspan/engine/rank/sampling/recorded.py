"""Sampling after a recorded decode step, by a graph of its own: one launch in place of up to four.

It owns the buffers that these graphs read: each row's parameters and position. Rows whose logits are changed first, by
penalties or a grammar, are sampled without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from longspan.attention.host_copy import copy_to
from longspan.engine.rank.recorder import Recorder
from longspan.engine.rank.sampling.gumbel import DrawParameters
from longspan.request import SamplingParams

_GREEDY = SamplingParams(temperature=0)
Draw = Callable[[Tensor, DrawParameters | None, Tensor | None], Tensor]
"""Draws a batch from logits [R, vocab], of any float dtype, at positions int64 [R]: int64 [2, R], see `gumbel.outcome`.
Without parameters all rows are greedy, and positions are not needed."""


class RecordedDraw:
    """Draws a token for each of up to R rows of `logits` [R, vocab], whose address does not change.

    There are three graphs: for greedy rows, for rows without top-k, top-p and min-p, and for all others. Each is
    recorded when this is made.
    """

    def __init__(self, logits: Tensor, draw: Draw, recorder: Recorder) -> None:
        rows, device = len(logits), logits.device
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._table = DrawParameters.of([_GREEDY] * rows, [0] * rows, device).table
        self._parameters: DrawParameters | None = None  # those in the table
        self._greedy = recorder.record(lambda: draw(logits, None, None))
        of_filters = {filters: DrawParameters(self._table, filters) for filters in (False, True)}
        self._sampled = {
            filters: recorder.record(partial(draw, logits, parameters, self._positions))
            for filters, parameters in of_filters.items()
        }

    def draw(self, parameters: DrawParameters | None, positions: Sequence[int]) -> Tensor:
        """The outcome int64 [2, T] of the first T rows, which have these positions. The next call overwrites it."""
        count = len(positions)
        if parameters is None:
            return self._greedy()[:, :count]
        if parameters is not self._parameters:
            self._table[:, :count] = parameters.table
            self._parameters = parameters
        copy_to(self._positions[:count], torch.tensor(positions, dtype=torch.int64))
        return self._sampled[parameters.filters]()[:, :count]
