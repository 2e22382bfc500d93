"""A launch's work in device memory: made for a step, or with room to be refilled under a captured graph.

It owns the buffers and their copying; what is in them is `work`'s, who reads them `attend`'s.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import chain

import torch
from torch import Tensor

from longspan.attention.backends.triton.work import (
    Item,
    Slots,
    Split,
    Tiling,
    Work,
    most_blocks,
    most_items,
    plan_work,
    sights_of_diagonal,
    sights_of_runs,
)
from longspan.plan.reach import QueryRun

ITEM_FIELDS = len(Item._fields)
SPLIT_FIELDS = len(Split._fields)
_ALIGNED = 4  # numbers in 16 bytes: a kernel is compiled anew for pointers that are aligned to less


@dataclass(frozen=True)
class Capacity:
    """How many there is room for; `partials` are blocks of partial results."""

    adjacent: int
    gathered: int
    splits: int
    partials: int
    rows: int
    index: int

    @staticmethod
    def of(work: Work) -> Capacity:
        """Just enough for `work`."""
        counts = len(work.adjacent), len(work.gathered), len(work.splits)
        return Capacity(*counts, work.partials, len(work.bounds), work.index.length)

    def holds(self, other: Capacity) -> bool:
        """Whether work of the size `other` fits."""
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


class WorkPlan:
    """Work of one launch, int32 on the device: items over adjacent and over gathered slots, splits, bounds, index.

    A launch has one program for every item there is room for; those without work end at once. Raises ValueError for
    work that the capacity does not hold.
    """

    def __init__(self, work: Work, device: torch.device, capacity: Capacity | None = None) -> None:
        self.capacity = room = capacity or Capacity.of(work)
        counts = room.adjacent * ITEM_FIELDS, room.gathered * ITEM_FIELDS, room.splits * SPLIT_FIELDS, room.rows * 2
        self._sizes = [-(-count // _ALIGNED) * _ALIGNED for count in counts]
        self._table = torch.empty(sum(self._sizes), dtype=torch.int32, device=device)
        self.adjacent, self.gathered, self.splits, self.bounds = torch.split(self._table, self._sizes)
        self.index = torch.empty(max(room.index, 1), dtype=torch.int32, device=device)
        if not self.fill(work):
            raise ValueError(f"work of size {Capacity.of(work)} in a plan of {room}")

    def fill(self, work: Work) -> bool:
        """Other work in the same memory, copied in the order of the current stream. False: too much, nothing done."""
        if not self.capacity.holds(Capacity.of(work)):
            return False
        table = array("i")
        records: tuple[Sequence[tuple[int, ...]], ...] = work.adjacent, work.gathered, work.splits, work.bounds
        for size, some in zip(self._sizes, records, strict=True):
            part = array("i", chain.from_iterable(some))
            table.extend(part)
            table.extend(array("i", bytes(4 * (size - len(part)))))  # zeros: no rows, no work
        _copy(self._table, torch.frombuffer(table, dtype=torch.int32) if table else None)
        _copy(self.index, _expanded(work.index))
        return True


class Plans:
    """One `WorkPlan` for each way of cutting the same rows, made when a layer first asks."""

    def __init__(self, rows: int, longest: int, device: torch.device, work: Callable[[Tiling], Work]) -> None:
        self.rows = rows
        self.longest = longest
        self._device = device
        self._work = work
        self._plans: dict[Tiling, WorkPlan] = {}

    @staticmethod
    def of_runs(runs: Sequence[QueryRun], rows: int, device: torch.device) -> Plans:
        """Of runs against cached rows."""
        longest = max((run.length for run in runs), default=1)
        return Plans(rows, longest, device, _work_of_runs(runs, rows))

    @staticmethod
    def of_diagonal(tokens: int, window: int | None, device: torch.device) -> Plans:
        """Of a segment against itself."""
        sights = sights_of_diagonal(tokens, window)
        return Plans(tokens, tokens, device, lambda tiling: plan_work(sights, Slots(), tokens, tiling))

    def plan(self, tiling: Tiling) -> WorkPlan:
        """The buffers for one way of cutting."""
        if tiling not in self._plans:
            self._plans[tiling] = self._make(tiling)
        return self._plans[tiling]

    def _make(self, tiling: Tiling) -> WorkPlan:
        return WorkPlan(self._work(tiling), self._device)


class RefillablePlans(Plans):
    """Plans that stay at one address: what a captured graph attends to, refilled before each replay.

    A first call outside the capture makes the buffers that the capture then finds. `index` is how many slots of spans
    too short for a range there is room for. Runs longer than `longest` are right, but not cut for speed.
    """

    def __init__(self, rows: int, longest: int, index: int, device: torch.device) -> None:
        super().__init__(rows, longest, device, _work_of_runs((), rows))
        self._index = index

    @property
    def plans(self) -> tuple[WorkPlan, ...]:
        """The buffers made so far."""
        return tuple(self._plans.values())

    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """Attend to `runs` from now on. False if they need more room than there is: then attend without the graph."""
        work_of = _work_of_runs(runs, self.rows)
        works = {tiling: work_of(tiling) for tiling in self._plans}
        if not all(self._plans[tiling].capacity.holds(Capacity.of(work)) for tiling, work in works.items()):
            return False
        self._work = work_of
        for tiling, work in works.items():
            self._plans[tiling].fill(work)
        return True

    def _make(self, tiling: Tiling) -> WorkPlan:
        """Raises RuntimeError if a capture asks for the buffers first."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attend once with these runs before the capture: its buffers must outlive the graph")
        return WorkPlan(self._work(tiling), self._device, self._capacity(tiling))

    def _capacity(self, tiling: Tiling) -> Capacity:
        items = most_items(self.rows, tiling)
        gathered = items if self._index else 0
        return Capacity(items, gathered, most_blocks(self.rows, tiling), items + gathered, self.rows, self._index)


def _work_of_runs(runs: Sequence[QueryRun], rows: int) -> Callable[[Tiling], Work]:
    sights, index = sights_of_runs(runs)
    return lambda tiling: plan_work(sights, index, rows, tiling)


def _expanded(slots: Slots) -> Tensor | None:
    """Every slot by its number; there can be as many as tokens in all contexts, so no loop over them."""
    if not slots.length:
        return None
    numbers = torch.frombuffer(array("i", chain.from_iterable(slots.spans)), dtype=torch.int32)
    starts, lengths = numbers.view(-1, 2).unbind(1)
    ends = lengths.cumsum(0, dtype=torch.int32)
    offsets = torch.repeat_interleave(starts - ends + lengths, lengths, output_size=slots.length)
    return torch.arange(slots.length, dtype=torch.int32) + offsets


def _copy(target: Tensor, source: Tensor | None) -> None:
    if source is None:
        return
    host = source.pin_memory() if target.is_cuda else source  # its allocator keeps it until the copy is over
    target[: len(source)].copy_(host, non_blocking=True)
