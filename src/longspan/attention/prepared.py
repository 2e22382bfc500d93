"""The attention of a step, prepared once for all layers.

It owns what is prepared for which rows, and when latents are expanded; how a backend prepares is the backend's matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

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
class PreparedReach:
    """What the rows of one phase attend to in the layers of one group, prepared."""

    # the same in plain integers
    reach: Reach
    # local rows against this rank's pages
    own: OwnRuns
    # for each pcp index, its travelling rows against this rank's pages; without runs where keys travel
    received: tuple[PreparedRuns, ...]
    # (first row, length, diagonal) of each segment longer than one token
    diagonal: tuple[tuple[int, int, PreparedDiagonal], ...]
    # prepares the rounds
    preparer: Preparer
    # results of `in_round`, which every layer asks for
    _rounds: dict[tuple[int, int, int, int], OwnRuns | None] = field(default_factory=dict)

    def in_round(self, shard: int, start: int, stop: int, rows: int) -> OwnRuns | None:
        """What this rank's `rows` travelling rows see of tokens [start, stop) of a shard's share; None if nothing."""
        key = shard, start, stop, rows
        if key not in self._rounds:
            runs = runs_in_round(self.reach.key_runs, shard, start, stop)
            self._rounds[key] = self.preparer.own(runs, rows) if runs else None
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
        groups = tuple(
            self.reach(reach, self._diagonals(view, window))
            for reach, window in zip(view.groups, self.windows, strict=True)
        )
        return PreparedPhase(view.start, view.stop, groups)

    def reach(self, reach: Reach, diagonal: tuple[tuple[int, int, PreparedDiagonal], ...] = ()) -> PreparedReach:
        """Prepare what the rows of one phase attend to in the layers of one group."""
        received = tuple(self.backend.prepare(block.runs, block.rows) for block in reach.blocks)
        return PreparedReach(reach, self.own(reach.own, reach.travel), received, diagonal, self)

    def own(self, runs: Sequence[QueryRun], rows: int) -> OwnRuns:
        """Prepare runs of this rank's own queries, which have `rows` rows.

        Runs without window starts attend to expanded latents where this needs fewer products.
        """
        if not self.expansion.saved_per_pair:
            return OwnRuns(self.backend.prepare(runs, rows))
        direct: list[QueryRun] = []
        expanded: list[tuple[ExpandedBlock, ...]] = []
        for sharers in _sharers(runs):
            pairs = sum(run.length * run.tokens for run in sharers)
            if not any(run.window_starts for run in sharers) and self.expansion.pays(pairs, sharers[0].tokens):
                expanded.append(tuple(self._blocks(sharers, rows)))
            else:
                direct += sharers
        return OwnRuns(self.backend.prepare(direct, rows) if direct or not expanded else None, tuple(expanded))

    def _diagonals(self, view: PhaseView, window: int | None) -> tuple[tuple[int, int, PreparedDiagonal], ...]:
        """(first row, length, diagonal) of each segment; those of equal length share what is prepared."""
        lengths = {length for _, length in view.diagonal}
        of_length = {length: self.backend.prepare_diagonal(length, window) for length in lengths}
        return tuple((row, length, of_length[length]) for row, length in view.diagonal)

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
