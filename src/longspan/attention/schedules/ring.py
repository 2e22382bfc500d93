"""A ring: every member's tensor is passed to every other member, and the next one arrives while one is used.

It owns the order in which tensors are passed on; it must not know what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from longspan.parallel.collectives import Collectives
from longspan.parallel.trace import COMPUTE


def circulate(
    group: Collectives, mine: Tensor, shapes: Sequence[tuple[int, ...]], label: str
) -> Iterator[tuple[int, Tensor]]:
    """Yield (member, its tensor) for every member, this one first. `shapes[i]` is the shape of member i's tensor.

    What the caller computes between two items overlaps with the transfer of the next one.
    """
    ring = [*range(group.rank, -1, -1), *range(group.size - 1, group.rank, -1)]
    current = mine
    for owner, following in zip(ring, [*ring[1:], None], strict=True):
        if following is None:
            with group.traffic.trace.span(label, COMPUTE):
                yield owner, current
            return
        arriving = group.start_shift(current, ring[-1], shapes[following], ring[1], label)
        with group.traffic.trace.span(label, COMPUTE):
            yield owner, current
        current = arriving()
