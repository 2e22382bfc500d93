"""CUDA graphs of short steps with prompt tokens, or with drafts, on a rank that computes alone.

The host needs longer to launch the kernels of such a step one by one than a GPU to compute it, and the first token of a
short prompt waits for both, as do all tokens of a step that verifies drafts. It owns the sizes and the tensors that
these graphs read; a step that fits none is run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.refillable import RefillableLocalStep
from longspan.attention.step_buffer import StepBuffer
from longspan.engine.rank.recorder import Recorder
from longspan.models.context import Model
from longspan.plan.view import RankView

SHORT_SIZES = (16, 32, 64, 128)
"""Rows of the graphs. Above them a GPU takes longer than the host."""


class ShortSteps:
    """The graphs of all sizes (ascending). One that `record` has not made is recorded in the first step of its size.

    With `longest` they are of steps whose segments have so many rows at most, and tiles of attention are chosen for
    these. `then` is recorded behind the layers: it is given the hidden states [rows, hidden].
    """

    def __init__(
        self, model: Model, attention: Attention, backend: RecordableBackend, recorder: Recorder,
        sizes: Sequence[int] = SHORT_SIZES, longest: int | None = None, then: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self.sizes = tuple(sizes)
        self.longest = longest
        self._then = then
        self._made: dict[int, ShortGraph] = {}
        self.last: ShortGraph | None = None  # the graph of the step in `hidden`; None if it was not recorded

    def record(self) -> Iterator[int]:
        """Record every size, the largest first, and yield it."""
        for rows in reversed(self.sizes):
            with torch.inference_mode():
                self.graph(rows)
            yield rows

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self.sizes)

    def hidden(self, view: RankView, token_ids: Callable[[], Tensor]) -> Tensor | None:
        """Hidden states [T, hidden] of a step, before the head. `token_ids` gives int64 [T] on the device.

        None if the step has too many rows, or something in it is not local or has no room in the graph's buffers. The
        next step overwrites the result.
        """
        self.last = None
        count = len(view.positions)
        rows = next((rows for rows in self.sizes if rows >= count), None)
        runs = (run.length for phase in view.phases for run in phase.groups[0].own)
        if rows is None or (self.longest is not None and max(runs, default=0) > self.longest):
            return None
        graph = self.graph(rows)
        found = graph.run(view, token_ids)
        self.last = None if found is None else graph
        return found

    def graph(self, rows: int) -> ShortGraph:
        """The graph of one of the sizes, recorded now if it has not been."""
        if rows not in self._made:
            buffer = StepBuffer(self._attention.pool.device)
            step = RefillableLocalStep(self._attention.preparer, self._backend, rows, buffer, self.longest)
            graph = ShortGraph(self._model, self._attention, step, (rows, self.longest), buffer, self._then)
            graph.record(self._recorder)
            self._made[rows] = graph
        return self._made[rows]


class ShortGraph:
    """The graph of one size: of so many rows, in segments of up to `longest`, or of any length if it is None."""

    def __init__(
        self, model: Model, attention: Attention, step: RefillableLocalStep, size: tuple[int, int | None],
        buffer: StepBuffer, then: Callable[[Tensor], None] | None,
    ) -> None:  # fmt: skip
        rows, self.longest = size
        self.rows = rows
        self.prepared = step.prepared
        self._model = model
        self._attention = attention
        self._step = step
        self._buffer = buffer
        self._then = then
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=attention.pool.device)
        self._positions = buffer.reserve(rows, torch.int64)
        self._replay: Callable[[], Tensor] = self._compute

    @property
    def positions(self) -> Tensor:
        """Positions of the rows of the last step, int64 [rows], at a fixed address."""
        return self._positions.device

    def record(self, recorder: Recorder) -> None:
        """Record the graph."""
        self._replay = recorder.record(self._compute)

    def run(self, view: RankView, token_ids: Callable[[], Tensor]) -> Tensor | None:
        """See `ShortSteps.hidden`."""
        count = len(view.positions)
        if not self._step.fill(view):
            return None
        self._token_ids[:count] = token_ids()
        self._positions.host[:count] = view.positions
        self._buffer.send()
        return self._replay()[:count]

    def _compute(self) -> Tensor:
        model = self._model
        if model.embedding is None:
            raise TypeError("a stage of a pipeline cannot be recorded")
        self._attention.begin(self.prepared)
        hidden = model.layers(model.embedding(self._token_ids), self._positions.device, self._attention)
        if self._then is not None:
            self._then(hidden)
        return hidden
