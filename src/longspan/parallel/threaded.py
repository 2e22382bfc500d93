"""Collectives between threads of one process, which pass tensors by reference.

It owns the queues between ranks and how waiting ranks are woken on an abort; it must not know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from queue import SimpleQueue

import torch
from torch import Tensor

from longspan.errors import WorkerDied
from longspan.parallel.collectives import Arrival, Collectives, Traffic


class ThreadFabric:
    """One queue from every rank to every other rank, shared by all groups.

    This is enough, because both ranks of a pair send and receive in the same order.
    """

    def __init__(self, world_size: int) -> None:
        self._links: list[list[SimpleQueue[Tensor | None]]] = [
            [SimpleQueue() for _ in range(world_size)] for _ in range(world_size)
        ]

    def send(self, source: int, target: int, tensor: Tensor) -> None:
        """Pass `tensor` from rank `source` to rank `target`, without waiting."""
        self._links[source][target].put(tensor)

    def receive(self, source: int, target: int) -> Tensor:
        """Wait for the next tensor from `source` to `target`. Raises `WorkerDied` after `abort`."""
        tensor = self._links[source][target].get()
        if tensor is None:
            self._links[source][target].put(None)  # later calls must raise too
            raise WorkerDied(f"rank {target} was waiting for rank {source}, which will not answer")
        return tensor

    def abort(self) -> None:
        """Make every current and later `receive` raise."""
        for row in self._links:
            for link in row:
                link.put(None)


class ThreadedCollectives(Collectives):
    """A group of threads. The queues are their only synchronisation."""

    def __init__(self, fabric: ThreadFabric, group: Sequence[int], rank: int, traffic: Traffic) -> None:
        super().__init__(group.index(rank), len(group), traffic)
        self._fabric = fabric
        self._group = tuple(group)
        self._me = rank

    def in_place(self, x: Tensor) -> list[Tensor]:
        """See `Collectives.in_place`: tensors are passed by reference."""
        for peer in self._group:
            if peer != self._me:
                self._fabric.send(self._me, peer, x)
        return [x if peer == self._me else self._fabric.receive(peer, self._me) for peer in self._group]

    def _send(self, x: Tensor, member: int) -> None:
        self._fabric.send(self._me, self._group[member], x)

    def _start_receive(self, shape: tuple[int, ...], dtype: torch.dtype, member: int) -> Arrival:
        return lambda: self._fabric.receive(self._group[member], self._me)

    def _exchange(self, sends: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        for peer, tensor in zip(self._group, sends, strict=True):  # sending never waits, so all can send first
            if peer != self._me and tensor.numel():
                self._fabric.send(self._me, peer, tensor)
        return [
            sends[index] if peer == self._me else self._received(peer, shape, sends[index])
            for index, (peer, shape) in enumerate(zip(self._group, shapes, strict=True))
        ]

    def _received(self, peer: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The tensor of a peer. One without elements is not sent, so that nobody waits for a peer that has nothing."""
        return self._fabric.receive(peer, self._me) if prod(shape) else like.new_empty(shape)
