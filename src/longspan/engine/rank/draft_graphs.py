"""CUDA graphs of the steps of an engine that drafts, where each rank has all pages of its heads: two replays a step.

The first replay verifies: it computes the rows of the step, and keeps what the module takes. The second drafts: all
runs of the module, with what lies between them. It owns the sizes of the second ones and the tensors that these read. A
step that fits none is computed without a graph, by the same functions. Which step fits follows from the plan alone, so
that all ranks of a TP group decide alike; a rank without room in its buffers computes in the shapes of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.prepared import PreparedPhase, PreparedStep
from longspan.attention.refillable import RefillableLocalRuns, RefillableLocalStep
from longspan.attention.step_buffer import Field, StepBuffer
from longspan.engine.rank.draft_chain import DraftChain, chain_values, inputs_of
from longspan.engine.rank.graphs import graph_sizes
from longspan.engine.rank.recorder import Recorder
from longspan.engine.rank.settled_rows import StepRows
from longspan.engine.rank.short_steps import ShortGraph, ShortSteps
from longspan.models.context import Model
from longspan.plan.drafts import SampledRows
from longspan.plan.mirror import KnownRequest
from longspan.plan.places import RowPlaces
from longspan.plan.view import RankView

_VERIFICATION_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of steps with drafts. Above them a GPU takes longer than the host."""


def verification_sizes(most: int, drafts: int, requests: Sequence[int] | None = None) -> tuple[int, ...]:
    """The sizes that are recorded where a step with drafts has `most` rows at most.

    If the user has chosen numbers of `requests`, they are those of so many requests with all their `drafts`.
    """
    chosen = _VERIFICATION_SIZES if requests is None else [count * (1 + drafts) for count in requests]
    return graph_sizes(most, chosen)


@dataclass(frozen=True)
class RecordedParts:
    """What the graphs are recorded of."""

    # the model
    model: Model
    # attention with the layers of the model
    attention: Attention
    # its backend
    backend: RecordableBackend
    # the runs of the module
    chain: DraftChain
    # the backend of the module's layers
    draft_backend: RecordableBackend
    # what the module takes, from the hidden states after the last layer [T, hidden]
    first_input: Callable[[Tensor], Tensor]


class DraftGraphs:
    """All graphs of one rank. `sizes` are the rows of steps that verify drafts, `prompt_sizes` of others, ascending.

    One that `record` has not made is recorded in the first step that it has room for.
    """

    def __init__(
        self, parts: RecordedParts, recorder: Recorder, sizes: Sequence[int], prompt_sizes: Sequence[int]
    ) -> None:
        self._parts = parts
        self._recorder = recorder
        self._taken: Tensor | None = None  # what the module takes after a recorded step [rows, width]
        self._most = max((*sizes, *prompt_sizes))
        common, carried = (parts.model, parts.attention, parts.backend, recorder), parts.chain.carried
        longest = parts.chain.tokens * (1 if carried is None else 2) + 1
        self._steps = (
            ShortSteps(*common, sizes, longest, self._keep, carried),
            ShortSteps(*common, prompt_sizes, None, self._keep, carried),
        )
        self._made: dict[tuple[ShortGraph, int], _DraftGraph] = {}

    @property
    def count(self) -> int:
        """Number of graphs of steps."""
        return sum(steps.count for steps in self._steps)

    def record(self) -> Iterator[int]:
        """Record every size, the largest first, with all drafting behind it, and yield it."""
        for steps in self._steps:
            for rows in reversed(steps.sizes):
                with torch.inference_mode():
                    graph = steps.graph(rows)
                    for requests in reversed(self._requests(rows)):
                        self._draft_graph(graph, requests)
                yield rows

    @property
    def most(self) -> int:
        """The most rows of a step that is recorded."""
        return self._most

    @property
    def rows(self) -> StepRows | None:
        """The rows of the step in `hidden`, and others; None if it was not recorded."""
        return None if self._last is None else self._last.rows

    def hidden(self, view: RankView, token_ids: Callable[[], Tensor], places: RowPlaces | None = None) -> Tensor | None:
        """See `ShortSteps.hidden`."""
        for steps in self._steps:
            steps.last = None
        found = (steps.hidden(view, token_ids, places) for steps in self._steps)
        return next((hidden for hidden in found if hidden is not None), None)

    def taken(self, rows: int) -> Tensor | None:
        """What the module takes [rows, width] after the step in `hidden`; None if that was not recorded."""
        return None if self._last is None or self._taken is None else self._taken[:rows]

    def draft(
        self, views: tuple[RankView, RankView | None], sampled: Sequence[SampledRows], drawn: Tensor,
        requests: Mapping[str, KnownRequest],
    ) -> Tensor | None:  # fmt: skip
        """The result of `DraftChain.tokens_after`, with more requests. The next step overwrites it.

        None if the step in `hidden` was not recorded, or the module reads something that is not local. If contexts are
        in too many pieces for a graph's buffers, drafting is computed without it, in the same shapes.

        Args:
            views: the step, and the same for the module's attention if that is its own: with a row for each place.
            sampled: the sampled rows by request.
            drawn: their outcome, int64 [2, S].
            requests: all requests by id.
        """
        graph = self._last
        if graph is None:
            return None
        room = next(room for room in self._requests(graph.size) if room >= len(sampled))
        return self._draft_graph(graph, room).run(views, sampled, drawn, requests)

    @property
    def _last(self) -> ShortGraph | None:
        """The graph of the step in `hidden`; None if it was not recorded."""
        return next((steps.last for steps in self._steps if steps.last is not None), None)

    def _requests(self, rows: int) -> tuple[int, ...]:
        """Numbers of requests for which there are graphs behind steps of `rows` rows: all with every draft, or none."""
        fewest = -(-rows // (self._parts.chain.tokens + 1))
        return tuple(sorted({fewest, rows}))

    def _draft_graph(self, graph: ShortGraph, requests: int) -> _DraftGraph:
        if (graph, requests) not in self._made:
            if self._taken is None:
                raise RuntimeError("no step has been recorded before drafting")
            made = _DraftGraph(self._parts, graph, requests, self._taken[: graph.size])
            made.record(self._recorder)
            self._made[graph, requests] = made
        return self._made[graph, requests]

    def _keep(self, hidden: Tensor) -> None:
        """Keep what the module takes from the hidden states [rows, hidden] of a step, at one address for all graphs."""
        taken = self._parts.first_input(hidden)
        if self._taken is None:
            self._taken = taken.new_zeros(self._most, taken.shape[1])
        self._taken[: len(taken)].copy_(taken)


class _DraftGraph:
    """The graph of drafting for up to `requests` requests behind a graph of a step."""

    def __init__(self, parts: RecordedParts, graph: ShortGraph, requests: int, taken: Tensor) -> None:
        self._chain = chain = parts.chain
        self._graph = graph
        self._taken = taken
        attention, rows, width = chain.attention, graph.size, chain.width
        self._buffer = buffer = StepBuffer(attention.pool.device)
        self._own: RefillableLocalStep | None = None  # of the first run, where the module's attention is its own
        if attention is not parts.attention:
            self._own = graph.refillable(attention, parts.draft_backend, buffer)
        self._requests = requests
        self._later: RefillableLocalRuns | None = None
        self._recorded_later = PreparedPhase(0, 0, ())  # the attention of further runs that the graph reads
        if width:
            self._later = RefillableLocalRuns(attention.preparer, parts.draft_backend, requests * width, width)
            self._recorded_later = self._later.phase
        self._padding = {"sample_rows": rows, "slots": -1}
        sizes = {
            "next_ids": rows + 1, "sample_rows": rows, "first_samples": requests, "first_rows": requests,
            "drafts": requests, "slots": requests * width,
        }  # fmt: skip
        self._fields: dict[str, Field] = {name: buffer.reserve(size, torch.int64) for name, size in sizes.items()}
        self._inputs = inputs_of({name: field.device for name, field in self._fields.items()}, requests)
        self._drawn = torch.zeros((2, rows), dtype=torch.int64, device=attention.pool.device)
        self._fill({})
        self._replay: Callable[[], Tensor] = self._compute

    def record(self, recorder: Recorder) -> None:
        """Record the graph."""
        self._buffer.send()
        self._replay = recorder.record(self._compute)

    def run(
        self, views: tuple[RankView, RankView | None], sampled: Sequence[SampledRows], drawn: Tensor,
        requests: Mapping[str, KnownRequest],
    ) -> Tensor | None:  # fmt: skip
        """See `DraftGraphs.draft`."""
        view, own = views
        first = self._graph.prepared
        if self._own is not None:
            found = None if own is None else self._own.fill(own)
            if found is None:
                return None
            first = found
        later, behind = self._chain.later_runs(sampled, requests), self._recorded_later
        if self._later is not None and not self._later.fill(later.runs):
            behind = self._chain.prepare(later, self._requests)
        self._fill(chain_values(view, sampled, later, self._chain.width))
        self._drawn[:, : drawn.shape[1]] = drawn
        self._buffer.send()
        fits = first is self._recorded_first and behind is self._recorded_later
        return self._replay() if fits else self._compute_with(first, behind)

    def _fill(self, values: Mapping[str, Sequence[int]]) -> None:
        for name, field in self._fields.items():
            found = values.get(name, ())
            field.host[: len(found)] = found
            field.host[len(found) :] = self._padding.get(name, 0)

    @property
    def _recorded_first(self) -> PreparedStep:
        """The attention of the first run that the graph reads."""
        return self._graph.recorded if self._own is None else self._own.prepared

    def _compute(self) -> Tensor:
        return self._compute_with(self._recorded_first, self._recorded_later)

    def _compute_with(self, first: PreparedStep, later: PreparedPhase) -> Tensor:
        """The result, with the attention of the first run and of those behind it."""
        chain, rows = self._chain, self._graph.rows
        attend = self._graph.attend(chain.attention, first)
        hidden = chain.first_run(self._inputs, self._drawn, self._taken, rows.positions, attend)
        return chain.tokens_after(self._inputs, self._drawn, rows, hidden, later)
