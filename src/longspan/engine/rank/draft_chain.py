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
from longspan.attention.prepared import PreparedPhase, PreparedStep
from longspan.attention.refillable import local_phase
from longspan.engine.rank.sampling.gumbel import usable_rows
from longspan.engine.rank.sampling.transfer import OneCopy, start_reading
from longspan.engine.rank.settled_rows import Carried, SpreadRows, StepRows, slot_writer
from longspan.models.context import Attend, DraftModule
from longspan.plan.drafts import SampledRows, later_plan, next_token_ids
from longspan.plan.mirror import KnownRequest
from longspan.plan.places import NO_SLOT
from longspan.plan.reach import Place, QueryRun
from longspan.plan.result import DraftTokens
from longspan.plan.view import RankView, rank_view


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
    # number of drafts behind it [M]
    drafts: Tensor
    # slots of the positions behind that of the plan that further runs may compute, -1 without a page [M, W]
    slots: Tensor

    def accepted(self, drawn: Tensor, token_ids: Tensor, most: int) -> Tensor:
        """How many drafts of each request are right and behind right ones only, int64 [M].

        A draft behind which no token could be sampled is not accepted: its row is computed again. `drawn` is the
        outcome of the sampled rows, int64 [2, S], `token_ids` are those of the rows, int64 [T]. A request has `most`
        drafts at most.
        """
        sampled, usable = drawn[0], usable_rows(drawn)
        numbers = torch.arange(most, device=sampled.device)
        before = self.first_samples[:, None] + numbers
        drafted = (self.first_rows[:, None] + numbers + 1).clamp_max(len(token_ids) - 1)
        right = sampled[before.clamp_max(len(sampled) - 1)] == token_ids[drafted]
        right &= usable[(before + 1).clamp_max(len(sampled) - 1)] & (numbers < self.drafts[:, None])
        return right.long().cumprod(1).sum(1)


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
    # what is left for the next step; None if that is planned when the drafts are known
    carried: Carried | None = None

    @property
    def width(self) -> int:
        """Positions behind that of a request's first sampled row in the plan that further runs may compute, W: the row
        may be K later, K drafts were in the step at most, and K - 1 runs follow."""
        slack = 0 if self.carried is None else self.tokens
        return slack + 2 * self.tokens - 1 if self.tokens > 1 else 0

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

    def prepare(self, later: LaterRuns, requests: int) -> PreparedPhase:
        """Further runs, prepared for one step, with rows for so many requests."""
        preparer, rows = self.attention.preparer, requests * self.width
        return local_phase(preparer, rows, [preparer.backend.prepare(runs, rows) for runs in later.runs])

    def inputs(self, view: RankView, sampled: Sequence[SampledRows], later: LaterRuns) -> ChainInputs:
        """The integers of a step on the device, without rows that pad them."""
        values, upload = chain_values(view, sampled, later, self.width), OneCopy()
        numbers = {name: upload.integers(each) for name, each in values.items()}
        sent = upload.send(self.attention.pool.device)
        return inputs_of({name: sent[number] for name, number in numbers.items()}, len(sampled))

    def first_run(self, inputs: ChainInputs, drawn: Tensor, taken: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The run over the rows of the step: [T, hidden].

        Args:
            inputs: the integers of the step.
            drawn: the outcome of the sampled rows, int64 [2, S].
            taken: what the module takes [T, hidden].
            positions: int64 [T].
            attend: attention of the rows.
        """
        next_ids = inputs.next_ids.index_copy(0, inputs.sample_rows, drawn[0])
        return self.module.layers(next_ids[:-1], taken, positions, attend)

    def tokens_after(
        self, inputs: ChainInputs, drawn: Tensor, rows: StepRows, hidden: Tensor, later: PreparedPhase
    ) -> Tensor:
        """int64 [2 + K, M]: see `Carried.table`.

        `drawn` int64 [2, S] is the outcome of the sampled rows, `hidden` [T, hidden] what the first run gave, `later`
        the further runs, prepared.
        """
        accepted = inputs.accepted(drawn, rows.token_ids, self.tokens)
        last, shifts = inputs.first_rows + accepted, rows.shifts[inputs.first_rows]
        chain, positions = hidden[last], rows.positions[last]
        found = [accepted, drawn[0, inputs.first_samples + accepted], self._best(chain)]
        first, width = torch.arange(len(accepted), device=drawn.device) * self.width, later.stop
        numbers = torch.arange(self.width, device=drawn.device)
        for run in range(1, self.tokens):
            place = shifts + accepted + (run - 1)
            # the first one also writes zeros behind its row: see `SettledRows.slots`
            written = numbers >= place[:, None] if run == 1 else numbers == place[:, None]
            writer = slot_writer(self.attention.ops.backend, inputs.slots.where(written, NO_SLOT).flatten().int())
            attend = SpreadRows(self.attention, PreparedStep((later,), writer), first + place, width)
            chain = self.module.layers(found[-1], chain, positions + run, attend)
            found.append(self._best(chain))
        return torch.stack(found)

    def _best(self, hidden: Tensor) -> Tensor:
        """The most likely token after each row of `hidden` [M, hidden], int64 [M]."""
        return self.module.head(hidden).argmax(-1)


def inputs_of(tensors: Mapping[str, Tensor], requests: int) -> ChainInputs:
    """The fields from one-dimensional tensors, of so many requests."""
    slots = tensors["slots"]
    return ChainInputs(**{**tensors, "slots": slots.view(requests, -1 if len(slots) else 0)})


def chain_values(view: RankView, sampled: Sequence[SampledRows], later: LaterRuns, width: int) -> dict[str, list[int]]:
    """The content of the fields of `ChainInputs`, row after row, for a step whose rows are not padded."""
    slots: list[int] = []
    for found in later.slots:
        slots += [*found, *(NO_SLOT,) * (width - len(found))]
    return {
        "next_ids": [*next_token_ids(view), 0],
        "sample_rows": [wanted.row for wanted in view.samples],
        "first_samples": [each.sample for each in sampled],
        "first_rows": [each.row for each in sampled],
        "drafts": [each.rows - 1 for each in sampled],
        "slots": slots,
    }


def read_chain(found: Tensor, sampled: Sequence[SampledRows]) -> Callable[[], tuple[DraftTokens, ...]]:
    """Start reading the result of `DraftChain.tokens_after`, of which the first requests are `sampled`."""
    read = start_reading([found])

    def finish() -> tuple[DraftTokens, ...]:
        ((accepted, _, *drafted),) = (each.tolist() for each in read())
        return tuple(
            DraftTokens(each.request_id, each.output + right, tuple(tokens[: each.drafted(right, len(tokens))]))
            for each, right, tokens in zip(sampled, accepted, zip(*drafted, strict=True), strict=False)
        )

    return finish
