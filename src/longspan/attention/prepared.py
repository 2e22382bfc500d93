"""A step's attention, prepared once for all its layers.

It owns when a backend is asked to prepare, and for which rows; how it does so is the backend's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from longspan.attention.backends.base import Backend, PreparedDiagonal, PreparedRuns, Writer
from longspan.attention.workload import ExpansionCost
from longspan.cache.pages import Span, clip_spans
from longspan.plan.reach import KeyRun, QueryRun, Reach
from longspan.plan.view import PhaseView, RankView

_EXPANDED_TOKENS = 1024  # cache rows held in expanded form at once


@dataclass(frozen=True)
class ExpandedBlock:
    """Cached latents that are expanded once for all runs that see them."""

    # of the cache
    spans: tuple[Span, ...]
    # against the expanded rows
    runs: PreparedRuns


@dataclass(frozen=True)
class OwnRuns:
    """Queries of this rank's own heads against cached rows, each run in the form that takes fewer products."""

    # against the rows as they are cached; None if all runs are better expanded
    direct: PreparedRuns | None
    # the blocks of every prefix that runs share
    expanded: tuple[tuple[ExpandedBlock, ...], ...] = ()


@dataclass(frozen=True)
class PreparedReach:
    """What rows of one phase attend to in layers of one group, prepared."""

    reach: Reach
    # of rows that stay
    own: OwnRuns
    # of the travelling rows of every pcp index, against the pages stored here
    visiting: tuple[PreparedRuns, ...]
    # (row, diagonal) of every segment longer than one token
    diagonal: tuple[tuple[int, int, PreparedDiagonal], ...]
    preparer: Preparer
    _rounds: dict[tuple[int, int, int, int], OwnRuns | None] = field(default_factory=dict)

    def in_round(self, shard: int, start: int, stop: int, rows: int) -> OwnRuns | None:
        """What the `rows` travelling rows see of tokens [start, stop) of a shard's share; None if that is nothing."""
        key = shard, start, stop, rows
        if key not in self._rounds:
            runs = runs_in_round(self.reach.key_runs, shard, start, stop)
            self._rounds[key] = self.preparer.own(runs, rows) if runs else None
        return self._rounds[key]


@dataclass(frozen=True)
class PreparedPhase:
    """The rows [start, stop) of one phase, by layer group."""

    start: int
    stop: int
    groups: tuple[PreparedReach, ...]


@dataclass(frozen=True)
class PreparedStep:
    """What attention does in a step."""

    phases: tuple[PreparedPhase, ...]
    writer: Writer


@dataclass(frozen=True)
class Preparer:
    """Asks a backend to prepare what a rank's view of a step says."""

    backend: Backend
    # when latents are better expanded
    expansion: ExpansionCost
    # of the model's layer groups, in a view's order
    windows: tuple[int | None, ...]

    def step(self, view: RankView) -> PreparedStep:
        """All of a step."""
        return PreparedStep(
            tuple(self.rows(each) for each in view.phases), self.backend.writer(view.writes, len(view.positions))
        )

    def rows(self, view: PhaseView) -> PreparedPhase:
        """The rows of one phase."""
        groups = tuple(
            self.reach(reach, self._diagonals(view, window))
            for reach, window in zip(view.groups, self.windows, strict=True)
        )
        return PreparedPhase(view.start, view.stop, groups)

    def reach(self, reach: Reach, diagonal: tuple[tuple[int, int, PreparedDiagonal], ...] = ()) -> PreparedReach:
        """What rows of one phase see in layers of one group."""
        visiting = tuple(self.backend.prepare(block.runs, block.rows) for block in reach.blocks)
        return PreparedReach(reach, self.own(reach.own, reach.travel), visiting, diagonal, self)

    def own(self, runs: Sequence[QueryRun], rows: int) -> OwnRuns:
        """`rows` rows of this rank's own queries: runs without a mask are expanded where that pays."""
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
        """Segments of one length share what is prepared for it."""
        lengths = {length for _, length in view.diagonal}
        of_length = {length: self.backend.prepare_diagonal(length, window) for length in lengths}
        return tuple((row, length, of_length[length]) for row, length in view.diagonal)

    def _blocks(self, sharers: Sequence[QueryRun], rows: int) -> Iterator[ExpandedBlock]:
        """Runs that see prefixes of the first one's rows, block by block of these."""
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
    """What the rows see of tokens [start, stop) of a shard's share."""
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
    """Runs that see prefixes of the same rows, the longest first: segments of one request on one shard.

    Requests that share cached pages and then part see different rows, though they begin alike.
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
