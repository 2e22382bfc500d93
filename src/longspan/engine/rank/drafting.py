"""Draft tokens from layers of a model: asked after sampling, on the ranks that have the hidden states.

It owns the runs of a module over a step's rows and over the tokens that it has drafted; it must not know how tokens are
sampled, nor which drafts the scheduler uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.host_copy import integers
from longspan.attention.pool import KVPool
from longspan.engine.rank.draft_chain import DraftChain, read_chain
from longspan.engine.rank.draft_graphs import DraftGraphs
from longspan.engine.rank.progress import with_progress
from longspan.engine.rank.sampling.transfer import start_reading
from longspan.engine.rank.settled_rows import Carried, RowInputs, SettledRows, SettledStep, StepRows
from longspan.models.context import Attend, DraftModule
from longspan.parallel.collectives import Collectives
from longspan.parallel.experts import GatheredExperts
from longspan.plan.drafts import SampledRows, accepted_rows, draft_run, next_token_ids, sampled_rows
from longspan.plan.mirror import KnownRequest
from longspan.plan.places import RowPlaces, row_places, widened
from longspan.plan.plan import Segment, StepPlan
from longspan.plan.reach import Place
from longspan.plan.result import DraftTokens
from longspan.plan.view import RankView, rank_view, rows_in_order

_LABEL = "ids"
ReadDrafts = Callable[[], tuple[DraftTokens, ...]]
"""Waits for the device and returns the drafts of this rank's sampled rows."""


@dataclass(frozen=True)
class SampledStep:
    """A step whose tokens are sampled."""

    # the step
    plan: StepPlan
    # this rank's share of it
    view: RankView
    # what the last layer gave for this rank's rows, after the final norm [T, hidden]
    hidden: Tensor
    # the outcome of this rank's sampled rows, int64 [2, samples]
    drawn: Tensor
    # its rows where the device found them; None where they are those of the plan
    settled: SettledStep | None = None

    @property
    def sampled(self) -> Tensor:
        """The tokens of this rank's sampled rows, int64 [samples]."""
        return self.drawn[0]


class Drafter(Protocol):
    """Drafts tokens on a rank. All ranks of the last stage call it, with every step in order."""

    @property
    def own_pool(self) -> KVPool | None:
        """The cached rows of layers that are not the model's; None if there are none."""

    @property
    def accepted(self) -> Tensor | None:
        """How many drafts of each request of the last step are right, int64 [requests or more] on the device, in the
        order of its rows; None if the host finds out."""

    def with_graphs(self, graphs: DraftGraphs | None) -> Drafter:
        """The same with graphs of the steps of its rank; None: without."""

    def record(self, shown: bool) -> None:
        """Record what is recorded. With `shown` there is a progress bar."""

    def hidden(
        self, plan: StepPlan, view: RankView, requests: Mapping[str, KnownRequest], token_ids: Callable[[], Tensor]
    ) -> tuple[Tensor, SettledStep | None] | None:
        """The model's hidden states [T, hidden] of a step, if it is recorded so that `draft` may be; None if it is not.

        `token_ids` gives int64 [T] on the device. Called for every step, before `draft`.
        """

    def settle(self, plan: StepPlan, view: RankView, requests: Mapping[str, KnownRequest]) -> SettledStep | None:
        """The rows of a step that is not recorded; None if they are those of the plan."""

    def draft(self, step: SampledStep, requests: Mapping[str, KnownRequest]) -> ReadDrafts:
        """Start drafting. The attention of a step that was not recorded is still prepared.

        `requests` are all requests by id.
        """


@dataclass(frozen=True)
class _Chain:
    """The rows of the last run on this rank, one of each request."""

    # the requests, in the order of the rows
    requests: tuple[str, ...]
    # what the run returned [rows, hidden]
    hidden: Tensor
    # the tokens drafted after it, int64 [rows]
    token_ids: Tensor


@dataclass(frozen=True)
class ModuleDrafter:
    """Drafts with a module for multi-token prediction, an EAGLE-3 module or a small model: see `DraftModule`.

    The first run is over the rows of the step, each with the token that follows it: the plan's, or the one just
    sampled. It writes the module's KV where the step wrote that of the model, and gives the first draft token after
    every sampled row. Rows behind a wrong draft write KV that is overwritten when their positions are computed again.
    Each further run is over one row of each request. A row stays on the ranks that computed the one before it. On the
    only rank of a context group nothing is read back between runs.
    """

    # the module
    module: DraftModule
    # most draft tokens of a request
    tokens: int
    # attention, with layers of the pool for the module
    attention: Attention
    # this rank's position in the context group
    place: Place
    # the context group, over which ranks tell each other what they have sampled
    context: Collectives
    # schedule of the runs behind the first
    schedule: str
    # experts that every rank computes for the rows of all; None if there are none
    experts: GatheredExperts | None
    # where the rank's tensors are
    device: torch.device
    # whether the attention is the module's own: its heads are others than the model's, and so are its rows in the cache
    has_own_attention: bool = False
    # what the observed layers of the model took in the last step
    observed: Callable[[], Tensor | None] = lambda: None
    # the runs on the only rank of a context group; None if there are more, or the backend cannot
    chain: DraftChain | None = None
    # recorded steps; None if they are not recorded
    graphs: DraftGraphs | None = None

    @property
    def own_pool(self) -> KVPool | None:
        """See `Drafter.own_pool`."""
        return self.attention.pool if self.has_own_attention else None

    def with_graphs(self, graphs: DraftGraphs | None) -> ModuleDrafter:
        """See `Drafter.with_graphs`."""
        return replace(self, graphs=graphs)

    def record(self, shown: bool) -> None:
        """See `Drafter.record`."""
        if self.graphs is not None:
            for _ in with_progress("recording steps with drafts", self.graphs.record(), self.graphs.count, shown):
                pass

    def hidden(
        self, plan: StepPlan, view: RankView, requests: Mapping[str, KnownRequest], token_ids: Callable[[], Tensor]
    ) -> tuple[Tensor, SettledStep | None] | None:
        """See `Drafter.hidden`."""
        graphs, carried = self.graphs, self.carried
        if graphs is None:
            return None
        if carried is None or len(view.positions) > graphs.most:
            found = graphs.hidden(view, token_ids)
            return None if found is None else (found, None)
        wide, places = self._places(carried, plan, view, requests)
        found, rows = graphs.hidden(wide, token_ids, places), graphs.rows
        if found is None or not isinstance(rows, SettledRows):
            return None
        return found, SettledStep(rows.first(len(view.positions), len(wide.positions)), wide)

    def settle(self, plan: StepPlan, view: RankView, requests: Mapping[str, KnownRequest]) -> SettledStep | None:
        """See `Drafter.settle`."""
        carried = self.carried
        if carried is None or not view.pending:
            return None
        wide, places = self._places(carried, plan, view, requests, prefill=False)
        return SettledStep(RowInputs.of(places, self.device).settle(carried.table), wide)

    def _places(
        self, carried: Carried, plan: StepPlan, view: RankView, requests: Mapping[str, KnownRequest],
        prefill: bool = True,
    ) -> tuple[RankView, RowPlaces]:  # fmt: skip
        """The share of the plan with a row for each place, and the places of its rows: see `plan/places.py`."""
        wide = self._view(widened(plan, prefill), requests)
        return wide, row_places(plan, view, wide, self.place.pcp, carried.columns, carried.none)

    @property
    def carried(self) -> Carried | None:
        """What a step leaves for the next one; None if that is planned when the drafts are known."""
        return None if self.chain is None else self.chain.carried

    @property
    def accepted(self) -> Tensor | None:
        """See `Drafter.accepted`."""
        return None if self.carried is None else self.carried.table[0]

    def first_input(self, hidden: Tensor) -> Tensor:
        """What the first run takes [T, width], from the hidden states [T, hidden] of the step that was just run."""
        return self.module.first_input(hidden, self.observed())

    def draft(self, step: SampledStep, requests: Mapping[str, KnownRequest]) -> ReadDrafts:
        """See `Drafter.draft`."""
        view, graphs, chain = step.view, self.graphs, self.chain
        own = self._view(widened(step.plan), requests) if self.has_own_attention else None
        recorded = None if graphs is None else graphs.taken(len(view.positions))
        sampled = [] if chain is None else sampled_rows(step.plan, view, requests)
        found = None if graphs is None else graphs.draft((view, own), sampled, step.drawn, requests)
        if found is None and step.settled is None and (own is not None or recorded is not None):
            self.attention.begin(self.attention.preparer.step(own or view))
        if chain is None:
            return self._draft_with_others(step, self.first_input(step.hidden), requests)
        if found is None:
            taken = self.first_input(step.hidden) if recorded is None else recorded
            found = self._follow(chain, step, taken, sampled, requests)
        if chain.carried is not None:
            chain.carried.keep(found, [each.request_id for each in sampled])
        return read_chain(found, sampled)

    def _follow(
        self, chain: DraftChain, step: SampledStep, taken: Tensor, sampled: Sequence[SampledRows],
        requests: Mapping[str, KnownRequest],
    ) -> Tensor:  # fmt: skip
        """The result of `DraftChain.tokens_after`, without a graph. The attention of rows of the plan is prepared."""
        view, settled = step.view, step.settled
        if settled is None:
            attend: Attend = self.attention
            positions = self._integers(view.positions)
            rows = StepRows(self._integers(view.token_ids), positions, torch.zeros_like(positions))
        else:
            attend, rows = settled.attend(self.attention, view), settled.rows
        later = chain.later_runs(sampled, requests)
        inputs = chain.inputs(view, sampled, later)
        hidden = chain.first_run(inputs, step.drawn, taken, rows.positions, attend)
        if not sampled:
            return hidden.new_empty(2 + self.tokens, 0, dtype=torch.int64)
        if self.experts is not None:
            self.experts.expect([len(sampled)])
        return chain.tokens_after(inputs, step.drawn, rows, hidden, chain.prepare(later, len(sampled)))

    def _draft_with_others(self, step: SampledStep, taken: Tensor, requests: Mapping[str, KnownRequest]) -> ReadDrafts:
        """`draft` where ranks tell each other what they have sampled. The attention of the first run is prepared."""
        view, attention = step.view, self.attention
        hidden = self.module.layers(self._next_ids(step), taken, self._integers(view.positions), attention)
        rows = hidden[self._integers([wanted.row for wanted in view.samples])]
        names = tuple((wanted.request_id, wanted.position) for wanted in view.samples)
        first = self._best(rows)
        if self.tokens == 1:
            return _reader(names, [(range(len(names)), first)])
        accepted = accepted_rows(step.plan, self._sampled_everywhere(step))
        mine = {request: row.sample for request, row in accepted.items() if row.pcp == self.place.pcp}
        chosen = self._integers(tuple(mine.values()))
        chain = _Chain(tuple(mine), rows[chosen], first[chosen])
        drafted = [(tuple(mine.values()), chain.token_ids)]
        for run in range(1, self.tokens):
            segments = draft_run(accepted, run, requests, self.place, self.attention.windows)
            if not segments:
                break
            accepted = {segment.request_id: accepted[segment.request_id] for segment in segments}
            chain = self._run(segments, chain, requests)
            drafted.append((tuple(mine[request] for request in chain.requests), chain.token_ids))
        return _reader(names, drafted)

    def _next_ids(self, step: SampledStep) -> Tensor:
        """The token after each row, int64 [T]."""
        view = step.view
        found = self._integers(next_token_ids(view))
        if view.samples:
            found.index_copy_(0, self._integers([wanted.row for wanted in view.samples]), step.sampled)
        return found

    def _sampled_everywhere(self, step: SampledStep) -> list[list[int]]:
        """The tokens that each pcp index has sampled. Waits for the device."""
        place = self.place
        counts = [0] * self.context.size
        for segment in step.plan.segments:
            counts[place.shards_of_pcp[segment.pcp][0]] += segment.sample
        sent = step.sampled if place.shard == place.shards_of_pcp[place.pcp][0] else step.sampled[:0]
        gathered = self.context.all_gather(sent, counts, _LABEL)
        return [gathered[shards[0]].tolist() for shards in place.shards_of_pcp]

    def _run(self, segments: Sequence[Segment], before: _Chain, requests: Mapping[str, KnownRequest]) -> _Chain:
        """One more run, over one row of each request that is left."""
        attention, pcps = self.attention, len(self.place.shards_of_pcp)
        plan = StepPlan(
            0, (), (), (), (), (), tuple(segments), (self.schedule,) * len(attention.windows),
            ("local",) * len(attention.windows),
        )  # fmt: skip
        view = self._view(plan, requests)
        attention.begin(attention.preparer.step(view))
        if self.experts is not None:
            self.experts.expect([sum(segment.pcp == pcp for segment in segments) for pcp in range(pcps)])
        names = tuple(segment.request_id for segment in rows_in_order(segments, self.place.pcp))
        number = {request: row for row, request in enumerate(before.requests)}
        rows = self._integers([number[request] for request in names])
        positions = self._integers(view.positions)
        hidden = self.module.layers(before.token_ids[rows], before.hidden[rows], positions, attention)
        return _Chain(names, hidden, self._best(hidden))

    def _view(self, plan: StepPlan, requests: Mapping[str, KnownRequest]) -> RankView:
        """This rank's share of a plan, as the module's attention needs it."""
        attention = self.attention
        return rank_view(plan, requests, self.place, attention.windows, attention.moves, attention.causal_runs)

    def _best(self, hidden: Tensor) -> Tensor:
        """The most likely token after each row of `hidden` [rows, hidden], int64 [rows]."""
        return self.module.head(hidden).argmax(-1) if len(hidden) else self._integers(())

    def _integers(self, values: Sequence[int]) -> Tensor:
        return integers(values, self.device)


def _reader(names: Sequence[tuple[str, int]], drafted: Sequence[tuple[Sequence[int], Tensor]]) -> ReadDrafts:
    """What joins drafted tokens to records.

    Args:
        names: request and output position of each sampled row.
        drafted: for each run, the sampled row to which each of its rows belongs, and the tokens int64 [rows].
    """
    read = start_reading([token_ids for _, token_ids in drafted])

    def finish() -> tuple[DraftTokens, ...]:
        found: dict[int, list[int]] = {}
        for (rows, _), token_ids in zip(drafted, read(), strict=True):
            for row, token in zip(rows, token_ids.tolist(), strict=True):
                found.setdefault(row, []).append(token)
        return tuple(DraftTokens(*names[row], tuple(token_ids)) for row, token_ids in found.items())

    return finish
