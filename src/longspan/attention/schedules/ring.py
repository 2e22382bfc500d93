"""A ring: every member's tensor visits every member, the next one in flight while this one is used.

It owns the order of visits; it must not know what circulates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from longspan.parallel.collectives import Collectives
from longspan.parallel.trace import COMPUTE


def circulate(
    group: Collectives, mine: Tensor, shapes: Sequence[tuple[int, ...]], label: str
) -> Iterator[tuple[int, Tensor]]:
    """(owner, tensor) of every member, this one's first; `shapes[i]` is that of member i's tensor.

    The caller's work between two items runs beside the transfer of the next.
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
