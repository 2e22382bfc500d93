"""The attention of a step, prepared once for all layers.

It owns what is prepared for which rows, and when latents are expanded; how a backend prepares is the backend's matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from longspan.attention.backends.base import Backend, PreparedDiagonal, PreparedRuns, Writer
from longspan.attention.workload import ExpansionCost
from longspan.cache.pages import Span, clip_spans
from longspan.plan.reach import KeyRun, QueryRun, Reach
from longspan.plan.view import PhaseView, RankView

_EXPANDED_TOKENS = 1024  # most cached rows that are held in expanded form at once


@dataclass(frozen=True)
class ExpandedBlock:
    """Cached latents that are expanded once, for all runs that see them."""

    # slots of the latents
    spans: tuple[Span, ...]
    # the runs, prepared; their spans are indices into the expanded rows
    runs: PreparedRuns


@dataclass(frozen=True)
class OwnRuns:
    """Runs of this rank's own queries against cached rows, each in the form that needs fewer products."""

    # runs that attend to rows as they are cached; None if all runs attend to expanded rows
    direct: PreparedRuns | None
    # for each group of runs that see prefixes of the same rows, the blocks of these rows
    expanded: tuple[tuple[ExpandedBlock, ...], ...] = ()


@dataclass(frozen=True)
class DiagonalRows:
    """Adjacent rows whose segments attend to themselves in one call."""

    # first row
    start: int
    # row after the last
    stop: int
    # whether the rows attend to expanded latents
    expanded: bool
    # the segments, prepared; rows count from `start`
    prepared: PreparedDiagonal


@dataclass(frozen=True)
class PreparedReach:
    """What the rows of one phase attend to in the layers of one group, prepared."""

    # the same in plain integers
    reach: Reach
    # local rows against this rank's pages, or all rows against the pages of all ranks; None if they see none, off the
    # diagonal
    own: OwnRuns | None
    # for each pcp index, its travelling rows against this rank's pages; without runs where keys travel
    received: tuple[PreparedRuns, ...]
    # prepares the rounds
    preparer: Preparer
    # diagonals of the local rows: they cover these rows, or there are none
    local_diagonal: tuple[DiagonalRows, ...] = ()
    # the same of this rank's travelling rows; rows count from the first of them
    travelling_diagonal: tuple[DiagonalRows, ...] = ()
    # results of `in_round`, which every layer asks for
    _rounds: dict[tuple[int, int, int, int], OwnRuns | None] = field(default_factory=dict)

    def in_round(self, shard: int, start: int, stop: int, rows: int) -> OwnRuns | None:
        """What this rank's `rows` travelling rows see of tokens [start, stop) of a shard's share; None if nothing."""
        key = shard, start, stop, rows
        if key not in self._rounds:
            runs = runs_in_round(self.reach.key_runs, shard, start, stop)
            self._rounds[key] = self.preparer.own(runs, rows)
        return self._rounds[key]


@dataclass(frozen=True)
class PreparedPhase:
    """The rows of one phase, prepared."""

    # first row
    start: int
    # row after the last
    stop: int
    # what the rows attend to in each layer group, widest window first
    groups: tuple[PreparedReach, ...]


@dataclass(frozen=True)
class PreparedStep:
    """The attention of a step, prepared."""

    # phases that have segments in the step
    phases: tuple[PreparedPhase, ...]
    # writes the rows' KV to the pool
    writer: Writer


@dataclass(frozen=True)
class Preparer:
    """Prepares a step from a rank's view of it."""

    # prepares runs, diagonals and writes
    backend: Backend
    # when latents are expanded
    expansion: ExpansionCost
    # width of window of each layer group, widest first
    windows: tuple[int | None, ...]

    def step(self, view: RankView) -> PreparedStep:
        """Prepare a whole step."""
        return PreparedStep(
            tuple(self.rows(each) for each in view.phases), self.backend.writer(view.writes, len(view.positions))
        )

    def rows(self, view: PhaseView) -> PreparedPhase:
        """Prepare the rows of one phase."""
        rows = view.stop - view.start
        groups = tuple(
            self.reach(reach, rows - reach.travel, view.diagonal, window)
            for reach, window in zip(view.groups, self.windows, strict=True)
        )
        return PreparedPhase(view.start, view.stop, groups)

    def reach(
        self,
        reach: Reach,
        travelling: int,
        segments: Sequence[tuple[int, int]] = (),
        window: int | None = None,
    ) -> PreparedReach:
        """Prepare what the rows of one phase attend to in the layers of one group.

        Args:
            reach: what they attend to.
            travelling: number of this rank's travelling rows.
            segments: (first row, length) of those that have a diagonal.
            window: positions that a row sees, its own included; None for all.
        """
        received = tuple(self.backend.prepare(block.runs, block.rows) for block in reach.blocks)
        runs, travel = reach.own, reach.travel
        if any(run.causal and self._expands(run) for run in runs):
            segments = sorted([*segments, *((run.row, run.length) for run in runs if _divisible(run))])
            runs = [_off_diagonal(run) if _divisible(run) else run for run in runs]
        local = [segment for segment in segments if segment[0] < travel]
        moving = [(row - travel, length) for row, length in segments if row >= travel]
        return PreparedReach(
            reach,
            self.own(runs, travel or travelling),  # rows that travel have runs here if they are read in place
            received,
            self,
            self._diagonals(local, travel, window),
            self._diagonals(moving, travelling, window),
        )

    def own(self, runs: Sequence[QueryRun], rows: int) -> OwnRuns | None:
        """Prepare runs of this rank's own queries, which have `rows` rows. None if no row sees anything.

        Runs without window starts attend to expanded latents where this needs fewer products.
        """
        runs = [run for run in runs if run.spans]
        if not runs:
            return None
        if not self.expansion.saved_per_pair:
            return OwnRuns(self.backend.prepare(runs, rows))
        direct: list[QueryRun] = []
        expanded: list[tuple[ExpandedBlock, ...]] = []
        for sharers in _sharers(runs):
            pairs = sum(run.length * run.tokens for run in sharers)
            plain = not any(run.window_starts or run.causal for run in sharers)
            if plain and self.expansion.pays(pairs, sharers[0].tokens):
                expanded.append(tuple(self._blocks(sharers, rows)))
            else:
                direct += sharers
        return OwnRuns(self.backend.prepare(direct, rows) if direct or not expanded else None, tuple(expanded))

    def _expands(self, run: QueryRun) -> bool:
        """Whether the rows of a causal run need fewer products with expanded latents."""
        return _divisible(run) and self.expansion.pays(sum(run.ends), run.tokens)

    def _diagonals(
        self, segments: Sequence[tuple[int, int]], rows: int, window: int | None
    ) -> tuple[DiagonalRows, ...]:
        """Cover `rows` rows with the diagonals of segments (first row, length): one call for neighbours of one form."""
        forms = groupby(segments, lambda segment: self.expansion.pays(segment[1] ** 2 / 2, segment[1]))
        alike = [(expanded, list(some)) for expanded, some in forms]
        found: list[DiagonalRows] = []
        for number, (expanded, some) in enumerate(alike, 1):
            start = found[-1].stop if found else 0
            stop = rows if number == len(alike) else sum(some[-1])
            counted = [(row - start, length) for row, length in some]
            prepared = self.backend.prepare_diagonal(counted, stop - start, window)
            found.append(DiagonalRows(start, stop, expanded, prepared))
        return tuple(found)

    def _blocks(self, sharers: Sequence[QueryRun], rows: int) -> Iterator[ExpandedBlock]:
        """Cut the rows of the first, longest run into blocks, each with the runs that see it.

        All runs see prefixes of these rows, so a run sees a prefix of a block.
        """
        longest = sharers[0]
        for start in range(0, longest.tokens, _EXPANDED_TOKENS):
            spans = tuple(clip_spans(longest.spans, start, start + _EXPANDED_TOKENS))
            held = min(longest.tokens - start, _EXPANDED_TOKENS)
            seen = [
                QueryRun(run.row, run.length, (Span(0, min(run.tokens - start, held)),))
                for run in sharers
                if run.tokens > start
            ]
            yield ExpandedBlock(spans, self.backend.prepare(seen, rows))


def runs_in_round(key_runs: Sequence[KeyRun], shard: int, start: int, stop: int) -> list[QueryRun]:
    """What rows see of tokens [start, stop) of a shard's share, as runs over these tokens counted from `start`."""
    runs: list[QueryRun] = []
    for run in key_runs:
        offset, length = run.span
        low, high = max(offset, start), min(offset + length, stop)
        if run.shard == shard and low < high:
            window_starts = (
                None if run.window_starts is None else tuple(max(0, x - (low - offset)) for x in run.window_starts)
            )
            runs.append(QueryRun(run.row, run.length, (Span(low - start, high - low),), window_starts))
    return runs


def _divisible(run: QueryRun) -> bool:
    """Whether a run is causal and can be divided into the diagonal and a run that every row sees."""
    return run.causal and run.window_starts is None


def _off_diagonal(run: QueryRun) -> QueryRun:
    """What a divisible run sees off the diagonal."""
    return QueryRun(run.row, run.length, tuple(clip_spans(run.spans, 0, run.tokens - run.length)))


def _sharers(runs: Sequence[QueryRun]) -> Iterable[list[QueryRun]]:
    """Group runs that see prefixes of the same rows, longest first: segments of one request on one shard.

    Comparing the first slot is not enough: requests with a common prefix hit begin with the same rows.
    """
    found: dict[int, list[list[QueryRun]]] = {}
    for run in sorted(runs, key=lambda run: -run.tokens):
        groups = found.setdefault(run.spans[0].slot, [])
        for group in groups:
            if tuple(clip_spans(group[0].spans, 0, run.tokens)) == run.spans:
                group.append(run)
                break
        else:
            groups.append([run])
    return [group for groups in found.values() for group in groups]
