"""Rows of a step whose tokens, positions and slots follow from the step before, and are found on the device.

It owns what a step with drafts leaves on the device for the next one, and how the next one's rows follow from it and
from its plan. It must not know how tokens are drafted or sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import Backend, Writer
from longspan.attention.layer import AttentionLayer
from longspan.attention.prepared import PreparedStep
from longspan.attention.step_buffer import Field, StepBuffer
from longspan.engine.rank.sampling.transfer import OneCopy
from longspan.errors import EngineError
from longspan.models.context import Attend
from longspan.plan.places import NO_SLOT, RowPlaces
from longspan.plan.view import RankView


class Carried:
    """What a step leaves on the device for the next one, for up to `requests` requests.

    `table` is int64 [2 + K, requests + 1]. Its rows are how many drafts of a request were right, the token that is
    sampled behind the last of these, and the K drafts behind that. The last column is of no request, and zero.
    """

    def __init__(self, tokens: int, requests: int, device: torch.device) -> None:
        self.table = torch.zeros(2 + tokens, requests + 1, dtype=torch.int64, device=device)
        self.columns: dict[str, int] = {}  # by request

    @property
    def none(self) -> int:
        """The column of no request."""
        return self.table.shape[1] - 1

    def keep(self, found: Tensor, requests: Sequence[str]) -> None:
        """Keep the columns of these requests, of `found` int64 [2 + K, requests or more].

        Raises `EngineError` if there is no room for them.
        """
        if len(requests) > self.none:
            raise EngineError(f"{len(requests)} requests are sampled in a step, and there is room for {self.none}")
        self.table[:, : len(requests)] = found[:, : len(requests)]
        self.columns = {request_id: column for column, request_id in enumerate(requests)}


@dataclass(frozen=True)
class StepRows:
    """The rows of a step [T], on the device."""

    # token of each row, int64
    token_ids: Tensor
    # its position, int64
    positions: Tensor
    # how much later that is than in the plan, int64
    shifts: Tensor


@dataclass(frozen=True)
class SettledRows(StepRows):
    """The same of a step whose first rows [M] take some of its places [P]: see `plan/places.py`."""

    # place of each of these rows, int64
    places: Tensor
    # slot to which each place is written, int32. Those before the rows of a segment have -1. Those behind them have
    # their slots, which may never have been written, and hold NaN: zeros are written there. No row sees them, but a
    # weight of zero times NaN is NaN
    slots: Tensor

    def first(self, rows: int, places: int) -> SettledRows:
        """The first rows and places."""
        found = {field.name: getattr(self, field.name)[:rows] for field in fields(self)}
        return SettledRows(**{**found, "slots": self.slots[:places]})


@dataclass(frozen=True)
class RowInputs:
    """The fields of `RowPlaces`, int64 on the device."""

    token_ids: Tensor
    positions: Tensor
    columns: Tensor
    numbers: Tensor
    places: Tensor
    first_rows: Tensor
    slots: Tensor

    @staticmethod
    def of(values: RowPlaces, device: torch.device) -> RowInputs:
        """Sent in one copy."""
        upload = OneCopy()
        for field in fields(values):
            upload.integers(getattr(values, field.name))
        return RowInputs(*upload.send(device))

    def settle(self, carried: Tensor) -> SettledRows:
        """The rows, from what the step before has left: see `Carried.table`."""
        shifts = carried[0, self.columns]
        places = self.places + shifts[: len(self.places)]
        begun = torch.arange(len(self.slots), device=carried.device) >= places[self.first_rows]
        return SettledRows(
            self.token_ids + carried[self.numbers + 1, self.columns],
            self.positions + shifts,
            shifts,
            places,
            self.slots.where(begun, NO_SLOT).int(),
        )


class RefillableRows:
    """Rows and places at fixed addresses, for up to `rows` rows and one place less than `places`.

    Rows that pad a step take the last place, which sees nothing and is not written.
    """

    def __init__(self, rows: int, places: int, carried: Carried, buffer: StepBuffer) -> None:
        self._carried = carried
        sizes = {"first_rows": places, "slots": places}
        self._fields: dict[str, Field] = {
            field.name: buffer.reserve(sizes.get(field.name, rows), torch.int64) for field in fields(RowInputs)
        }
        self._padding = {"columns": carried.none, "places": places - 1, "slots": NO_SLOT}
        self._inputs = RowInputs(**{name: field.device for name, field in self._fields.items()})
        self.fill(None)
        self.rows = self._inputs.settle(carried.table)
        self.places = places

    def fill(self, values: RowPlaces | None) -> None:
        """Replace the rows; None: by such as pad a step. The caller sends the buffer."""
        for name, field in self._fields.items():
            found: Sequence[int] = () if values is None else getattr(values, name)
            field.host[: len(found)] = found
            field.host[len(found) :] = self._padding.get(name, 0)

    def settle(self) -> None:
        """Find the rows, in place. This is what is recorded."""
        found = self._inputs.settle(self._carried.table)
        for field in fields(found):
            getattr(self.rows, field.name).copy_(getattr(found, field.name))


@dataclass(frozen=True)
class SpreadRows:
    """See `Attend`. The first rows take some of the places of a prepared step, and which ones only the device knows."""

    # attention of all layers
    attention: Attention
    # the places, prepared
    step: PreparedStep
    # the places that the rows take, int64 [M]
    places: Tensor
    # number of places
    count: int
    # all other rows, prepared; None if there are none
    rest: PreparedStep | None = None

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`. Places that no row takes are computed from zeros, and are not used."""
        few = len(self.places)
        spread = [
            x.new_zeros(self.count, *x.shape[1:]).index_copy(0, self.places, x[:few]) for x in (q, k, v)
        ]  # fmt: skip
        self.attention.begin(self.step)
        found = self.attention(layer, spread[0], spread[1], spread[2])[self.places]
        if self.rest is None:
            return found
        self.attention.begin(self.rest)
        return torch.cat((found, self.attention(layer, q[few:], k[few:], v[few:])))


@dataclass(frozen=True)
class SettledStep:
    """A step of which some rows are settled."""

    # the rows
    rows: SettledRows
    # a rank's share of the plan with a row for each place
    wide: RankView

    def attend(self, attention: Attention, view: RankView) -> Attend:
        """The attention of all rows, in the layers of `attention`; `view` is the rank's share of the plan itself."""
        preparer, few, count = attention.preparer, len(self.rows.places), len(self.rows.slots)
        prepared = tuple(preparer.rows(phase) for phase in self.wide.phases)
        step = PreparedStep(prepared, slot_writer(attention.ops.backend, self.rows.slots))
        if few == len(view.positions):
            return SpreadRows(attention, step, self.rows.places, count)
        (phase,) = (replace(preparer.rows(phase), start=0, stop=phase.stop - few) for phase in view.phases[-1:])
        writes = [run._replace(row=run.row - few) for run in view.writes if run.row >= few]
        rest = PreparedStep((phase,), preparer.backend.writer(writes, phase.stop))
        return SpreadRows(attention, step, self.rows.places, count, rest)


def slot_writer(backend: Backend, slots: Tensor) -> Writer:
    """What writes rows to `slots` int32 [T]. Raises `EngineError` if the backend cannot."""
    writer = backend.slot_writer(slots)
    if writer is None:
        raise EngineError("the attention backend cannot write to slots that only the device knows")
    return writer
