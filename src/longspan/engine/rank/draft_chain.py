"""Drafting on the only rank of a context group: the accepted rows are found on the device, and nothing is read back.

It owns the integers that a device needs for this, and the runs of a module one after the other; it must not know
whether they are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import Writer
from longspan.attention.layer import AttentionLayer
from longspan.attention.prepared import PreparedPhase, PreparedStep
from longspan.attention.refillable import local_phase
from longspan.engine.rank.sampling.transfer import OneCopy, start_reading
from longspan.errors import EngineError
from longspan.models.context import DraftModule
from longspan.plan.drafts import SampledRows, later_plan, next_token_ids
from longspan.plan.mirror import KnownRequest
from longspan.plan.reach import Place, QueryRun
from longspan.plan.result import DraftTokens
from longspan.plan.view import RankView, rank_view

_NO_TOKEN = -1  # in place of a draft that there is not: no token is the same
_NO_SLOT = -1


@dataclass(frozen=True)
class ChainInputs:
    """What the device needs to draft after a step of T rows, for M requests. Rows that pad these are 0, or as said."""

    # the token after each row, as far as the plan has it [T + 1]; the last one is of no row
    next_ids: Tensor
    # row of each sampled token [S]; T for those that pad them
    sample_rows: Tensor
    # number of each request's first sampled row, among all sampled rows [M]
    first_samples: Tensor
    # the row [M]
    first_rows: Tensor
    # its position [M]
    positions: Tensor
    # the drafts behind it, -1 where there are fewer [M, K]
    drafted: Tensor
    # slots of the positions behind it that further runs may compute, -1 without a page [M, W]
    slots: Tensor

    def accepted(self, sampled: Tensor) -> Tensor:
        """How many drafts of each request are right and behind right ones only, int64 [M].

        `sampled` are the sampled tokens, int64 [S].
        """
        numbers = torch.arange(self.drafted.shape[1], device=sampled.device)
        before = (self.first_samples[:, None] + numbers).clamp_max(len(sampled) - 1)
        return (sampled[before] == self.drafted).long().cumprod(1).sum(1)


@dataclass(frozen=True)
class LaterRuns:
    """The further runs of a module: what they may see, and where they may write."""

    # for each layer group what a request's W positions see; the row of position w of request m is m · W + w
    runs: tuple[tuple[QueryRun, ...], ...]
    # by request, the slots of its positions
    slots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DraftChain:
    """A module that drafts `tokens` tokens, and the attention of its layers."""

    # the module
    module: DraftModule
    # attention with its layers
    attention: Attention
    # this rank's position
    place: Place
    # most draft tokens of a request, K
    tokens: int

    @property
    def width(self) -> int:
        """Positions behind the first sampled row of a request that further runs may compute, W: K drafts were in the
        step at most, and K - 1 runs follow."""
        return 2 * self.tokens - 1 if self.tokens > 1 else 0

    @property
    def is_possible(self) -> bool:
        """Whether the backend can write to slots, and see tokens, that only the device knows."""
        backend = self.attention.ops.backend
        nowhere = torch.full((1,), _NO_SLOT, dtype=torch.int32, device=self.attention.pool.device)
        return backend.causal_runs and backend.slot_writer(nowhere) is not None

    def later_runs(self, sampled: Sequence[SampledRows], requests: Mapping[str, KnownRequest]) -> LaterRuns:
        """The further runs after a step."""
        attention, width, lengths = self.attention, self.width, [each.later(self.tokens) for each in sampled]
        if not any(lengths):
            return LaterRuns(tuple(() for _ in attention.windows), tuple(() for _ in sampled))
        plan = later_plan(sampled, self.tokens, len(attention.windows))
        view = rank_view(plan, requests, self.place, attention.windows, attention.moves, causal_runs=True)
        slots = [slot for run in view.writes for slot in range(run.slot, run.slot + run.length)]
        moved: dict[int, int] = {}
        of_request: list[tuple[int, ...]] = []
        at = 0
        for number, length in enumerate(lengths):
            moved |= {at + offset: number * width + offset for offset in range(length)}
            of_request.append(tuple(slots[at : at + length]))
            at += length
        runs = tuple(tuple(replace(run, row=moved[run.row]) for run in reach.own) for reach in view.phases[0].groups)
        return LaterRuns(runs, tuple(of_request))

    def prepare(self, later: LaterRuns) -> PreparedPhase:
        """Further runs, prepared for one step."""
        preparer, rows = self.attention.preparer, len(later.slots) * self.width
        return local_phase(preparer, rows, [preparer.backend.prepare(runs, rows) for runs in later.runs])

    def inputs(self, view: RankView, sampled: Sequence[SampledRows], later: LaterRuns) -> ChainInputs:
        """The integers of a step on the device, without rows that pad them."""
        values, upload = chain_values(view, sampled, later, self.tokens, self.width), OneCopy()
        numbers = {name: upload.integers(each) for name, each in values.items()}
        sent = upload.send(self.attention.pool.device)
        return inputs_of({name: sent[number] for name, number in numbers.items()}, len(sampled))

    def first_run(self, inputs: ChainInputs, sampled: Tensor, taken: Tensor, positions: Tensor) -> Tensor:
        """The run over the rows of the step, whose attention is prepared: [T, hidden].

        Args:
            inputs: the integers of the step.
            sampled: the sampled tokens, int64 [S].
            taken: what the module takes [T, hidden].
            positions: int64 [T].
        """
        next_ids = inputs.next_ids.index_copy(0, inputs.sample_rows, sampled)
        return self.module.layers(next_ids[:-1], taken, positions, self.attention)

    def tokens_after(self, inputs: ChainInputs, sampled: Tensor, hidden: Tensor, later: PreparedPhase) -> Tensor:
        """int64 [1 + K, M]: for each request the number of its accepted drafts, and what is drafted behind them.

        `hidden` [T, hidden] is what the first run gave, `later` the further runs, prepared.
        """
        accepted = inputs.accepted(sampled)
        chain = hidden[inputs.first_rows + accepted]
        found = [accepted, self._best(chain)]
        first = torch.arange(len(accepted), device=sampled.device) * self.width
        for run in range(1, self.tokens):
            place = accepted + (run - 1)
            written = self._writer(inputs.slots.gather(1, place[:, None])[:, 0])
            attend = RowsOfRuns(self.attention, PreparedStep((later,), written), first + place, later.stop)
            if run == 1:
                behind = torch.arange(self.width, device=sampled.device) > place[:, None]
                attend = replace(attend, cleared=self._writer(inputs.slots.where(behind, _NO_SLOT).flatten()))
            chain = self.module.layers(found[-1], chain, inputs.positions + accepted + run, attend)
            found.append(self._best(chain))
        return torch.stack(found)

    def _writer(self, slots: Tensor) -> Writer:
        """What writes rows to `slots` int64 [T]."""
        writer = self.attention.ops.backend.slot_writer(slots.int())
        if writer is None:
            raise EngineError("the attention backend cannot write to slots that only the device knows")
        return writer

    def _best(self, hidden: Tensor) -> Tensor:
        """The most likely token after each row of `hidden` [M, hidden], int64 [M]."""
        return self.module.head(hidden).argmax(-1)


@dataclass(frozen=True)
class RowsOfRuns:
    """See `Attend`. The rows are some of those of prepared runs, and which ones only the device knows."""

    # attention of all layers
    attention: Attention
    # the runs
    step: PreparedStep
    # the rows, int64 [M]
    rows: Tensor
    # number of rows of the runs
    count: int
    # first writes zeros to as many rows: to slots of the runs that have never been written, and may hold NaN. No row
    # sees them, but a weight of zero times NaN is NaN
    cleared: Writer | None = None

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`. The other rows of the runs compute what is not used; `k` and `v` are written only."""
        if self.cleared is not None:
            zeros = k.new_zeros(self.count, *k.shape[1:])
            self.cleared.write(self.attention.pool.layers[layer.index], zeros, zeros)
        self.attention.begin(self.step)
        spread = q.new_zeros(self.count, *q.shape[1:]).index_copy(0, self.rows, q)
        return self.attention(layer, spread, k, v)[self.rows]


def inputs_of(tensors: Mapping[str, Tensor], requests: int) -> ChainInputs:
    """The fields from one-dimensional tensors, of so many requests."""
    tables = {"drafted", "slots"}
    return ChainInputs(**{
        name: each.view(requests, -1 if len(each) else 0) if name in tables else each for name, each in tensors.items()
    })  # fmt: skip


def chain_values(
    view: RankView, sampled: Sequence[SampledRows], later: LaterRuns, tokens: int, width: int
) -> dict[str, list[int]]:
    """The content of the fields of `ChainInputs`, row after row, for a step whose rows are not padded."""
    drafted: list[int] = []
    slots: list[int] = []
    for each, found in zip(sampled, later.slots, strict=True):
        drafts = view.token_ids[each.row + 1 : each.row + each.rows]
        drafted += [*drafts, *(_NO_TOKEN,) * (tokens - len(drafts))]
        slots += [*found, *(_NO_SLOT,) * (width - len(found))]
    return {
        "next_ids": [*next_token_ids(view), 0],
        "sample_rows": [wanted.row for wanted in view.samples],
        "first_samples": [each.sample for each in sampled],
        "first_rows": [each.row for each in sampled],
        "positions": [each.position for each in sampled],
        "drafted": drafted,
        "slots": slots,
    }


def read_chain(found: Tensor, sampled: Sequence[SampledRows]) -> Callable[[], tuple[DraftTokens, ...]]:
    """Start reading the result of `DraftChain.tokens_after`, of which the first requests are `sampled`."""
    read = start_reading([found])

    def finish() -> tuple[DraftTokens, ...]:
        ((accepted, *drafted),) = (each.tolist() for each in read())
        return tuple(
            DraftTokens(each.request_id, each.output + right, tuple(tokens[: each.drafted(right, len(tokens))]))
            for each, right, tokens in zip(sampled, accepted, zip(*drafted, strict=True), strict=False)
        )

    return finish
