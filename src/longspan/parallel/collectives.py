"""Collectives: how the ranks of a group exchange tensors, with every sent byte counted.

It owns the semantics of the collectives and their accounting; the transports (`threaded.py`, `distributed.py`,
`nccl.py`) only move tensors between members. It must not know what the tensors mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.errors import EngineError
from longspan.parallel.trace import TRANSFER, Trace


@dataclass
class Traffic:
    """What one rank sent. A label names who communicates: `tp`, say, or a schedule's name."""

    # bytes sent to other ranks, by label
    bytes_by_label: dict[str, int] = field(default_factory=dict)
    # number of collectives and sends, by label
    calls_by_label: dict[str, int] = field(default_factory=dict)
    # when transfers and computation took place; empty unless it is switched on
    trace: Trace = field(default_factory=Trace, compare=False)
    # what all labels begin with now
    prefix: str = ""

    @contextmanager
    def within(self, purpose: str) -> Iterator[None]:
        """Let labels begin with `purpose/` meanwhile."""
        before, self.prefix = self.prefix, f"{self.prefix}{purpose}/"
        try:
            yield
        finally:
            self.prefix = before

    def count(self, label: str, sent: int, calls: int = 1) -> None:
        """Count calls that send `sent` bytes in all."""
        label = self.prefix + label
        self.bytes_by_label[label] = self.bytes_by_label.get(label, 0) + sent
        self.calls_by_label[label] = self.calls_by_label.get(label, 0) + calls

    def reset(self) -> None:
        """Set all counts to zero, and clear the trace."""
        self.bytes_by_label.clear()
        self.calls_by_label.clear()
        self.trace.clear()

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Copies of the bytes and the calls by label."""
        return self.bytes_by_label.copy(), self.calls_by_label.copy()

    def replace(self, counts: tuple[dict[str, int], dict[str, int]]) -> None:
        """Set all counts."""
        self.bytes_by_label, self.calls_by_label = counts[0].copy(), counts[1].copy()

    def add(self, other: Traffic) -> None:
        """Add another rank's counts to these. A collective counts once for each rank that joined it."""
        for label, sent in other.bytes_by_label.copy().items():  # a copy: the other rank's thread may be counting
            self.bytes_by_label[label] = self.bytes_by_label.get(label, 0) + sent
        for label, calls in other.calls_by_label.copy().items():
            self.calls_by_label[label] = self.calls_by_label.get(label, 0) + calls


Arrival = Callable[[], Tensor]
"""A transfer in flight: a call waits for it and returns the received tensor."""


class Collectives(ABC):
    """One rank's handle on a group of ranks. In a group of one nothing is sent, and the input is returned.

    The caller gives up ownership of every tensor that it passes: peers may read it after the call has returned, so it
    must not be written to again. Views of pages are written to again, but not before the step's end. All members call
    the same collectives in the same order, also with empty tensors.
    Every collective takes a `label`, under which its bytes are counted.
    """

    def __init__(self, rank: int, size: int, traffic: Traffic) -> None:
        self.rank = rank  # index of this member in the group, not the rank in the world
        self.size = size
        self.traffic = traffic

    @abstractmethod
    def _send(self, x: Tensor, member: int) -> None:
        """Start sending x to a member, without waiting for its arrival."""

    @abstractmethod
    def _start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        """Start receiving the next tensor that a member sends to this one."""

    @abstractmethod
    def _exchange(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send `sends[i]` to member i, and return the tensors that all members sent here: `shapes[i]` from member i."""

    def send(self, x: Tensor, member: int, label: str) -> None:
        """Send x to one member, which must call `receive`, without waiting for its arrival."""
        self.traffic.count(label, x.numel() * x.element_size())
        self._send(x, member)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Tensor:
        """Wait for the next tensor that `member` sends here, and return it."""
        return self._start_receive(shape, dtype, member)()

    def start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        """Start receiving the next tensor that `member` sends here. The caller may compute meanwhile."""
        return self.traffic.trace.until_arrival("receive", self._start_receive(shape, dtype, member))

    def start_shift(self, x: Tensor, to: int, shape: tuple[int, ...], source: int, label: str) -> Arrival:
        """Start one step of a ring: send x to member `to`, and receive a tensor from member `source`.

        The received tensor has shape `shape` and the dtype of x. The caller may compute meanwhile.
        """
        arriving = self.start_receive(shape, x.dtype, source)
        self.send(x, to, label)
        return arriving

    def all_to_all(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], label: str) -> list[Tensor]:
        """Send `sends[i]` to member i. Returns one tensor from each member, in member order: `shapes[i]` from member i.

        All tensors have one dtype. Empty tensors are allowed.
        """
        sent = sum(x.numel() * x.element_size() for x in sends)
        own = sends[self.rank]
        self.traffic.count(label, sent - own.numel() * own.element_size())
        with self.traffic.trace.span(label, TRANSFER):
            return self._exchange(sends, shapes)

    def all_gather(self, x: Tensor, rows: Sequence[int], label: str, dim: int = 0) -> list[Tensor]:
        """Every member's tensor, in member order. Member i's has size `rows[i]` in `dim`; the other sizes are equal."""
        if len(rows) == 1:
            return [x]
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in rows]
        return self.all_to_all([x] * self.size, shapes, label)

    def in_place(self, x: Tensor) -> list[Tensor]:
        """Every member's tensor, in member order: the tensors themselves, where members see what others write later.

        Members may pass different shapes. Raises `EngineError` if they share no memory.
        """
        raise EngineError("the members of this group share no memory")

    def await_writes(self, among: Sequence[int], label: str) -> None:
        """Tell these members that what this one has written may be read, and wait until all of them have told it.

        Other members tell nobody anything.
        """
        told = [int(member in among and self.rank in among) for member in range(self.size)]
        if told[self.rank]:
            note = torch.ones(1, dtype=torch.bool)
            self.all_to_all([note[:count] for count in told], [(count,) for count in told], label)

    def all_reduce(self, x: Tensor, label: str) -> Tensor:
        """The sum over members of x, which has one shape on all. Summed in member order, so all get the same bits."""
        return _sum(self.all_gather(x, [x.shape[0]] * self.size, label))

    def sum_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, label: str
    ) -> tuple[Tensor, Tensor] | None:
        """(residual + the sum over members of x, the norm of this) in one operation, all [T, width].

        None, alike on all members, where the transport has none for such tensors: see `all_reduce`.
        """
        return None

    def open_fast_sums(self) -> tuple[bool, str] | None:
        """Prepare a faster `all_reduce`, and `sum_add_norm`, where the transport has them; all members do so together.

        Returns whether it is used, and what sums from now on and why, for people; None if there is no choice.
        """
        return None

    def reduce_scatter(self, x: Tensor, rows: Sequence[int], label: str) -> Tensor:
        """The sum over members of a part of x, which has one shape on all: member i gets part i, of `rows[i]` rows."""
        shape = (rows[self.rank], *x.shape[1:])
        return _sum(self.all_to_all(torch.split(x, list(rows)), [shape] * self.size, label))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in their order. The tensors are not changed."""
    if len(parts) == 1:
        return parts[0]
    total = torch.add(parts[0], parts[1])
    for part in parts[2:]:
        total.add_(part)
    return total
