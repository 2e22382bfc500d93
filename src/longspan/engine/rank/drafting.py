"""Draft tokens from layers of a model: asked after sampling, on the ranks that have the hidden states.

It owns the runs of a module over a step's rows and over the tokens that it has drafted; it must not know how tokens are
sampled, nor which drafts the scheduler uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.host_copy import integers
from longspan.attention.pool import KVPool
from longspan.engine.rank.sampling.transfer import start_reading
from longspan.models.context import DraftModule
from longspan.parallel.collectives import Collectives
from longspan.parallel.experts import GatheredExperts
from longspan.plan.drafts import accepted_rows, draft_run
from longspan.plan.mirror import KnownRequest
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
    # the tokens of this rank's sampled rows, int64 [samples]
    sampled: Tensor


class Drafter(Protocol):
    """Drafts tokens on a rank. All ranks of the last stage call it, with every step in order."""

    @property
    def own_pool(self) -> KVPool | None:
        """The cached rows of layers that are not the model's; None if there are none."""

    def draft(self, step: SampledStep, requests: Mapping[str, KnownRequest]) -> ReadDrafts:
        """Start drafting. The attention of the step is still prepared; `requests` are all requests by id."""


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
    Each further run is over one row of each request. A row stays on the ranks that computed the one before it.
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
    # what the first run takes instead of the hidden states after the last layer [T, hidden]; None for these
    first_input: Callable[[], Tensor] | None = None

    @property
    def own_pool(self) -> KVPool | None:
        """See `Drafter.own_pool`."""
        return self.attention.pool if self.has_own_attention else None

    def draft(self, step: SampledStep, requests: Mapping[str, KnownRequest]) -> ReadDrafts:
        """See `Drafter.draft`."""
        view, attention = step.view, self.attention
        if self.has_own_attention:
            attention.begin(attention.preparer.step(self._view(step.plan, requests)))
        taken = step.hidden if self.first_input is None else self.first_input()
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
        known = [*view.token_ids[1:], 0] if view.token_ids else []
        for row, token in view.following:
            known[row] = token
        found = self._integers(known)
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
