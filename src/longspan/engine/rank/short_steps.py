"""CUDA graphs of short steps with prompt tokens, on a rank that computes alone.

The host needs longer to launch the kernels of such a step one by one than a GPU to compute it, and the first token of a
short prompt waits for both. It owns the sizes and the tensors that these graphs read; a step that fits none is run
without a graph.
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
    """The graphs of all sizes (ascending). One that `record` has not made is recorded in the first step of its size."""

    def __init__(
        self, model: Model, attention: Attention, backend: RecordableBackend, recorder: Recorder,
        sizes: Sequence[int] = SHORT_SIZES,
    ) -> None:  # fmt: skip
        self._model = model
        self._attention = attention
        self._backend = backend
        self._recorder = recorder
        self._sizes = tuple(sizes)
        self._made: dict[int, _ShortGraph] = {}

    def record(self) -> Iterator[int]:
        """Record every size, the largest first, and yield it."""
        for rows in reversed(self._sizes):
            with torch.inference_mode():
                self._graph(rows)
            yield rows

    @property
    def count(self) -> int:
        """Number of graphs."""
        return len(self._sizes)

    def hidden(self, view: RankView, token_ids: Callable[[], Tensor]) -> Tensor | None:
        """Hidden states [T, hidden] of a step, before the head. `token_ids` gives int64 [T] on the device.

        None if the step has too many rows, or something in it is not local or has no room in the graph's buffers. The
        next step overwrites the result.
        """
        count = len(view.positions)
        rows = next((rows for rows in self._sizes if rows >= count), None)
        return None if rows is None else self._graph(rows).run(view, token_ids)

    def _graph(self, rows: int) -> _ShortGraph:
        if rows not in self._made:
            buffer = StepBuffer(self._attention.pool.device)
            step = RefillableLocalStep(self._attention.preparer, self._backend, rows, buffer)
            graph = _ShortGraph(self._model, self._attention, step, rows, buffer)
            graph.record(self._recorder)
            self._made[rows] = graph
        return self._made[rows]


class _ShortGraph:
    """The graph of one size."""

    def __init__(
        self, model: Model, attention: Attention, step: RefillableLocalStep, rows: int, buffer: StepBuffer
    ) -> None:
        self._model = model
        self._attention = attention
        self._step = step
        self._buffer = buffer
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=attention.pool.device)
        self._positions = buffer.reserve(rows, torch.int64)
        self._replay: Callable[[], Tensor] = self._compute

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
        self._attention.begin(self._step.prepared)
        return model.layers(model.embedding(self._token_ids), self._positions.device, self._attention)
