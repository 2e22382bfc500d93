"""How ranks exchange tensors: one group, a few collectives, every byte counted.

It owns the meaning of the collectives and their accounting; transports (`threaded.py`, `distributed.py`)
only move tensors between members. It must not know what the tensors mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.parallel.trace import TRANSFER, Trace


@dataclass
class Traffic:
    """Bytes a rank sent to others and collectives it joined, by label (`tp` or a schedule's name), and their trace."""

    bytes_by_label: dict[str, int] = field(default_factory=dict)
    calls_by_label: dict[str, int] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)

    def count(self, label: str, sent: int) -> None:
        """Add one collective."""
        self.bytes_by_label[label] = self.bytes_by_label.get(label, 0) + sent
        self.calls_by_label[label] = self.calls_by_label.get(label, 0) + 1

    def reset(self) -> None:
        """Forget what was counted."""
        self.bytes_by_label.clear()
        self.calls_by_label.clear()
        self.trace.spans.clear()

    def add(self, other: Traffic) -> None:
        """Sum over ranks: bytes add up, a collective that all ranks joined counts once for each."""
        for label, sent in other.bytes_by_label.copy().items():  # the rank may be counting
            self.bytes_by_label[label] = self.bytes_by_label.get(label, 0) + sent
        for label, calls in other.calls_by_label.copy().items():
            self.calls_by_label[label] = self.calls_by_label.get(label, 0) + calls


Arrival = Callable[[], Tensor]


class Collectives(ABC):
    """One rank's handle on a group. A group of one moves nothing and returns its input.

    A tensor handed over is given away: peers may still read it after the call, so nobody writes to it. Every
    member calls the same collectives in the same order, members with no rows included.
    """

    def __init__(self, rank: int, size: int, traffic: Traffic) -> None:
        self.rank = rank
        self.size = size
        self.traffic = traffic

    @abstractmethod
    def _send(self, x: Tensor, member: int) -> None:
        """Start sending x to a member; returns without waiting for it to arrive."""

    @abstractmethod
    def _start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        """Begin to take in the next tensor a member sends here."""

    @abstractmethod
    def _exchange(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send `sends[i]` to member i and return what each member sent here, of shape `shapes[i]`."""

    def send(self, x: Tensor, member: int, label: str) -> None:
        """Hand x to one member, which must call `receive`; does not wait for it."""
        self.traffic.count(label, x.numel() * x.element_size())
        self._send(x, member)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Tensor:
        """What `member` sends here next, of this shape."""
        return self._start_receive(shape, dtype, member)()

    def start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        """The same, in flight while the caller computes; call what is returned for the tensor."""
        return self.traffic.trace.until_arrival("receive", self._start_receive(shape, dtype, member))

    def start_shift(self, x: Tensor, to: int, shape: tuple[int, ...], source: int, label: str) -> Arrival:
        """Send x to member `to` while taking in what `source` sends, of this shape and x's dtype: a step of a ring.

        Call what is returned for the tensor; the caller may compute meanwhile.
        """
        arriving = self.start_receive(shape, x.dtype, source)
        self.send(x, to, label)
        return arriving

    def all_to_all(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], label: str) -> list[Tensor]:
        """`sends[i]` goes to member i; returns one tensor from each, of `shapes[i]`, in member order."""
        sent = sum(x.numel() * x.element_size() for x in sends)
        own = sends[self.rank]
        self.traffic.count(label, sent - own.numel() * own.element_size())
        with self.traffic.trace.span(label, TRANSFER):
            return self._exchange(sends, shapes)

    def all_gather(self, x: Tensor, rows: Sequence[int], label: str, dim: int = 0) -> list[Tensor]:
        """Every member's tensor, in member order; member i's has `rows[i]` entries in `dim`."""
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in rows]
        return self.all_to_all([x] * self.size, shapes, label)

    def all_reduce(self, x: Tensor, label: str) -> Tensor:
        """The sum over members, in member order, so the same bits on all of them."""
        parts = self.all_gather(x, [x.shape[0]] * self.size, label)
        if len(parts) == 1:
            return parts[0]
        total = torch.add(parts[0], parts[1])
        for part in parts[2:]:
            total.add_(part)
        return total
