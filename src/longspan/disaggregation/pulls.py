"""What one rank still lacks of a prompt that another instance computes: which tokens to ask of whom.

It owns this bookkeeping; pure, it must not know how questions and answers travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.disaggregation.layout_map import Cell
from longspan.plan.source import Extent

_MISSING, _ASKED, _HERE = 0, 1, 2


@dataclass(frozen=True)
class Pull:
    """Ask `rank` for the tokens of `runs` (in position order) in the layers and heads of a cell."""

    rank: int
    cell: int
    layers: Extent
    heads: Extent
    runs: tuple[Extent, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(stop - start for start, stop in self.runs)


class Pulls:
    """Tokens move from missing over asked to here, each cell for itself.

    `wanted` are the positions this rank stores, in order; `limits[c]` is the most tokens of cell c in one pull. Tokens
    are offered by the ranks that have them, again if need be: what is here or in flight is not asked for twice.
    """

    def __init__(self, cells: Sequence[Cell], wanted: Sequence[Extent], limits: Sequence[int]) -> None:
        self._cells = tuple(cells)
        self._limits = tuple(limits)
        self._wanted = tuple(wanted)
        self._first = wanted[0][0] if wanted else 0
        length = wanted[-1][1] - self._first if wanted else 0
        state = bytearray([_HERE]) * length
        for start, stop in wanted:
            self._mark(state, (start, stop), _MISSING)
        self._states = [bytearray(state) for _ in self._cells]
        self._left = [state.count(_MISSING)] * len(self._cells)
        self._offers: deque[tuple[int, int, Extent]] = deque()  # (cell, rank, positions)

    @property
    def ranks(self) -> set[int]:
        """Those that may have something for this rank; nobody if it stores no token."""
        return {rank for cell in self._cells for rank in cell.ranks} if self._wanted else set()

    @property
    def done(self) -> bool:
        """Whether everything is here."""
        return not any(self._left)

    def offer(self, rank: int, runs: Sequence[Extent]) -> None:
        """A rank can send these positions."""
        for number, cell in enumerate(self._cells):
            if rank in cell.ranks:
                self._offers += ((number, rank, run) for run in self._clip(runs))

    def next(self) -> Pull | None:
        """What to ask for now, counted as asked from here on; None until more is offered."""
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
            if low < 0:
                continue
            high = low
            while high < stop - self._first and high - low < room and state[high] == _MISSING:
                high += 1
            run = (low + self._first, high + self._first)
            if run[1] < stop:
                self._offers.appendleft((cell, holder, (run[1], stop)))
            self._mark(state, run, _ASKED)
            taken.append(run)
            room -= high - low
        if not taken:
            return None
        cell_of = self._cells[number]
        return Pull(rank, number, cell_of.layers, cell_of.heads, tuple(taken))

    def arrived(self, pull: Pull) -> None:
        """An answer is stored."""
        for run in pull.runs:
            self._mark(self._states[pull.cell], run, _HERE)
        self._left[pull.cell] -= pull.tokens

    def refused(self, pull: Pull) -> None:
        """The rank no longer has it: somebody will offer it again."""
        for run in pull.runs:
            self._mark(self._states[pull.cell], run, _MISSING)

    def _mark(self, state: bytearray, run: Extent, value: int) -> None:
        state[run[0] - self._first : run[1] - self._first] = bytes([value]) * (run[1] - run[0])

    def _clip(self, runs: Sequence[Extent]) -> list[Extent]:
        """Offered positions that are wanted; both are in order."""
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
