"""Which KV a decode rank still has to fetch of one prompt, and from which prefill rank it can be requested next.

It owns this bookkeeping; pure, it must not know how requests and blocks are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.disaggregation.layout_map import Cell
from longspan.plan.source import Extent

_MISSING, _REQUESTED, _RECEIVED = 0, 1, 2  # states of a token in a cell


@dataclass(frozen=True)
class Pull:
    """One block to request from a prefill rank."""

    # the rank, in the prefill instance
    rank: int
    # number of the cell
    cell: int
    # layers of the cell
    layers: Extent
    # KV heads of the cell
    heads: Extent
    # positions, in order
    runs: tuple[Extent, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(stop - start for start, stop in self.runs)


class PullTracker:
    """The state of every wanted token in every cell: missing, requested or received.

    `wanted` are the positions that this rank stores, in order. `limits[c]` is the most tokens of cell c in one pull.
    Prefill ranks offer tokens once they are computed. An offer may be repeated: tokens that are requested or received
    are not requested again.
    """

    def __init__(self, cells: Sequence[Cell], wanted: Sequence[Extent], limits: Sequence[int]) -> None:
        self._cells = tuple(cells)
        self._limits = tuple(limits)
        self._wanted = tuple(wanted)
        self._first = wanted[0][0] if wanted else 0
        length = wanted[-1][1] - self._first if wanted else 0
        state = bytearray([_RECEIVED]) * length  # positions between wanted ones count as received
        for start, stop in wanted:
            self._mark(state, (start, stop), _MISSING)
        self._states = [bytearray(state) for _ in self._cells]
        self._left = [state.count(_MISSING)] * len(self._cells)  # tokens of each cell that are not received
        self._offers: deque[tuple[int, int, Extent]] = deque()  # (cell, rank, positions)

    @property
    def ranks(self) -> set[int]:
        """The prefill ranks that may have wanted tokens; empty if no token is wanted."""
        return {rank for cell in self._cells for rank in cell.ranks} if self._wanted else set()

    @property
    def done(self) -> bool:
        """Whether all wanted tokens are received in all cells."""
        return not any(self._left)

    def offer(self, rank: int, runs: Sequence[Extent]) -> None:
        """Record that a prefill rank can send these positions."""
        for number, cell in enumerate(self._cells):
            if rank in cell.ranks:
                self._offers += ((number, rank, run) for run in self._clip(runs))

    def next(self) -> Pull | None:
        """The next block to request, now marked as requested; None until more is offered."""
        # a pull has tokens of one cell from one rank, of one offer or of adjacent ones in the queue
        taken: list[Extent] = []
        number = rank = room = 0
        while self._offers:
            cell, holder, (start, stop) = self._offers[0]
            if not taken:
                number, rank, room = cell, holder, self._limits[cell]
            elif (cell, holder) != (number, rank) or not room:
                break
            self._offers.popleft()
            state = self._states[cell]
            low = state.find(_MISSING, start - self._first, stop - self._first)
            if low < 0:  # all of the offer was requested or received already
                continue
            high = low
            while high < stop - self._first and high - low < room and state[high] == _MISSING:
                high += 1
            run = (low + self._first, high + self._first)
            if run[1] < stop:  # the rest of the offer stays in the queue
                self._offers.appendleft((cell, holder, (run[1], stop)))
            self._mark(state, run, _REQUESTED)
            taken.append(run)
            room -= high - low
        if not taken:
            return None
        cell_of = self._cells[number]
        return Pull(rank, number, cell_of.layers, cell_of.heads, tuple(taken))

    def received(self, pull: Pull) -> None:
        """Mark a pull's tokens as received."""
        for run in pull.runs:
            self._mark(self._states[pull.cell], run, _RECEIVED)
        self._left[pull.cell] -= pull.tokens

    def refused(self, pull: Pull) -> None:
        """Mark a pull's tokens as missing again: the rank does not have them. They wait for another offer."""
        for run in pull.runs:
            self._mark(self._states[pull.cell], run, _MISSING)

    def _mark(self, state: bytearray, run: Extent, value: int) -> None:
        state[run[0] - self._first : run[1] - self._first] = bytes([value]) * (run[1] - run[0])

    def _clip(self, runs: Sequence[Extent]) -> list[Extent]:
        """The wanted positions among `runs`. Both are in order."""
        found: list[Extent] = []
        wanted = iter(self._wanted)
        mine = next(wanted, None)
        for start, stop in runs:
            while mine is not None and mine[1] <= start:
                mine = next(wanted, None)
            while mine is not None and mine[0] < stop:
                found.append((max(start, mine[0]), min(stop, mine[1])))
                if mine[1] > stop:
                    break
                mine = next(wanted, None)
        return found
