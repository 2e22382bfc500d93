"""Expert parallelism: rows go to the ranks that hold their experts, and the weighted sums come back.

It owns the two forms of this exchange; it must not know what an expert computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.parallel.collectives import Collectives

_LABEL = "experts"
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, hidden], experts [T, k] int64, weights [T, k]) → [T, hidden]: the weighted sum over the experts held here."""


class GatheredExperts:
    """Experts that are split over a group. Every member gets the rows of all, and computes what its own experts add.

    Nothing depends on the routing but numbers, so the host waits for nothing, and a step can be recorded.
    """

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self._rows: tuple[int, ...] | None = None

    def expect(self, rows: Sequence[int] | None) -> None:
        """Say how many rows each member has from now on; None: as many as this one."""
        self._rows = None if rows is None else tuple(rows)

    def apply(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Compute) -> Tensor:
        """See `ExpertParallel.apply`: x [T, hidden], experts and weights [T, k] → [T, hidden]."""
        rows = self._rows or (len(x),) * self._group.size
        # one tensor for both: fp32 holds every integer up to 2^24
        routing = torch.cat((weights, experts.to(weights.dtype)), dim=1)
        everyone = torch.cat(self._group.all_gather(x, rows, _LABEL))
        shares, chosen = torch.cat(self._group.all_gather(routing, rows, _LABEL)).chunk(2, dim=1)
        return self._group.reduce_scatter(compute(everyone, chosen.long(), shares), rows, _LABEL)


class SharedExperts:
    """Experts that are split over a group: member m holds experts [extents[m][0], extents[m][1]).

    A member is sent only the rows that one of its experts wants, each once, however many of its experts want it: fewer
    bytes than `GatheredExperts` sends. The numbers of rows are exchanged first, since they depend on the routing.
    """

    def __init__(self, group: Collectives, extents: Sequence[tuple[int, int]]) -> None:
        self._group = group
        self._extents = tuple(extents)

    def apply(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Compute) -> Tensor:
        """See `ExpertParallel.apply`: x [T, hidden], experts and weights [T, k] → [T, hidden]."""
        # for each member, the rows that are routed to some of its experts
        wanted = [
            ((experts >= start) & (experts < stop)).any(-1).nonzero().squeeze(-1) for start, stop in self._extents
        ]
        counts = self._swap([torch.tensor([len(rows)], device=x.device) for rows in wanted], [1] * len(wanted))
        arriving = [int(count) for count in counts]
        rows = torch.cat(self._swap([x[rows] for rows in wanted], arriving))
        chosen = torch.cat(self._swap([experts[rows] for rows in wanted], arriving))
        shares = torch.cat(self._swap([weights[rows] for rows in wanted], arriving))
        sums = compute(rows, chosen, shares)
        total = torch.zeros_like(x)
        returned = self._swap(list(torch.split(sums, arriving)), [len(rows) for rows in wanted])
        for rows, part in zip(wanted, returned, strict=True):
            total.index_add_(0, rows, part)
        return total

    def _swap(self, sends: Sequence[Tensor], arriving: Sequence[int]) -> list[Tensor]:
        """All-to-all of rows: `sends[i]` goes to member i, which sends `arriving[i]` rows of the same width."""
        rest = sends[0].shape[1:]
        return self._group.all_to_all(sends, [(rows, *rest) for rows in arriving], _LABEL)
