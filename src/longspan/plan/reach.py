"""What a rank's rows see off the diagonal: which slots of which shard, in layers of one group (idea 4).

It owns the translation from segments and page tables to runs of rows and slots; plain integers, it must
not touch tensors or communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from longspan.cache.pages import PageTable, Span, clip_spans
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, window_start

Moves = Literal["queries", "keys"]
"""What travels under a schedule; None where nothing does."""

_WINDOW_ROWS = 256  # rows under a window that share a run: it bounds their mask


@dataclass(frozen=True)
class QueryRun:
    """Query rows [row, row + length) of one segment and the slots they attend to.

    Without `window_starts` every row sees all of them. Under a window that ends inside, row i sees those from number
    `window_starts[i]` on, counted over the spans.
    """

    row: int
    length: int
    spans: tuple[Span, ...]
    window_starts: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens it sees."""
        return sum(span.length for span in self.spans)


@dataclass(frozen=True)
class Block:
    """The travelling query rows of one pcp index, and what each of its segments sees on this shard."""

    rows: int
    runs: Sequence[QueryRun]


@dataclass(frozen=True)
class KeyShare:
    """What one shard contributes when keys travel: its needed tokens as spans of its slots."""

    spans: tuple[Span, ...]
    tokens: int


@dataclass(frozen=True)
class KeyRun:
    """Query rows here and, for each shard, which tokens of its `KeyShare` they see; `span` counts in the share."""

    shard: int
    row: int
    length: int
    span: Span
    window_starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reach:
    """What rows of one phase attend to off the diagonal in layers of one group.

    Rows from `travel` on (counted in the phase) travel, or what they see does. `own` are the others, whose pages all
    lie here. `blocks` (queries travel) and `shares`, `key_runs` (keys travel) describe the travelling segments, whose
    rows count from `travel`.
    """

    schedule: str
    travel: int
    own: Sequence[QueryRun]
    blocks: tuple[Block, ...]
    shares: tuple[KeyShare, ...]
    key_runs: tuple[KeyRun, ...]

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Travelling rows of every pcp index: the same on all ranks."""
        return tuple(block.rows for block in self.blocks)


@dataclass(frozen=True)
class Place:
    """Where a rank is: the pcp index whose tokens it computes, the shard it stores, the shards of every pcp index."""

    pcp: int
    shard: int
    shards_of_pcp: tuple[tuple[int, ...], ...]


class _Sight(NamedTuple):
    """Rows [row, row + length) of a segment see tokens [first, first + tokens) of a shard, less by `window_starts`."""

    row: int
    length: int
    first: int
    tokens: int
    window_starts: tuple[int, ...] | None


def reach(
    schedule: str,
    group: int,
    window: int | None,
    members: Sequence[Segment],
    mine: Sequence[Segment],
    requests: Mapping[str, KnownRequest],
    place: Place,
    moves: Moves | None,
) -> Reach:
    """What the segments `mine` of one phase see in layers of `group`; `members` are the phase's on all ranks.

    `moves` is what travels under `schedule`.
    """
    local = [segment for segment in mine if segment.num_remote_groups <= group]
    moving = sorted(
        (s for s in members if s.num_remote_groups > group), key=lambda s: s.num_remote_groups
    )  # the order of their ranks' rows
    by_pcp = [[s for s in moving if s.pcp == pcp] for pcp in range(len(place.shards_of_pcp))]
    keys_travel = moves == "keys"
    shares, key_runs = _keys(moving, by_pcp[place.pcp], window, requests, place) if keys_travel else ((), ())
    return Reach(
        schedule=schedule,
        travel=sum(segment.length for segment in local),
        own=_runs(local, window, requests, place.shard),
        blocks=tuple(
            Block(sum(s.length for s in block), () if keys_travel else _runs(block, window, requests, place.shard))
            for block in by_pcp
        ),
        shares=shares,
        key_runs=key_runs,
    )


def _sights(segment: Segment, table: PageTable, shard: int, window: int | None) -> Iterator[_Sight]:
    """A window's far end moves with the row, and what lies before it on a shard is a prefix too: numbers, no mask."""
    until = table.visible(shard, segment.unmasked_until)
    if window is None:
        if until:
            yield _Sight(0, segment.length, 0, until, None)
        return
    for row in range(0, segment.length, _WINDOW_ROWS):
        positions = range(segment.start + row, min(segment.start + row + _WINDOW_ROWS, segment.stop))
        window_starts = [table.visible(shard, window_start(position, window)) for position in positions]
        first = window_starts[0]
        seeing = tuple(low - first for low in window_starts if low < until)
        if not seeing:
            return
        yield _Sight(row, len(seeing), first, until - first, seeing if seeing[-1] else None)


def _runs(
    segments: Sequence[Segment], window: int | None, requests: Mapping[str, KnownRequest], shard: int
) -> tuple[QueryRun, ...]:
    runs: list[QueryRun] = []
    row = 0
    for segment in segments:
        table = requests[segment.request_id].table
        for sight in _sights(segment, table, shard, window):
            spans = table.spans(shard, segment.unmasked_until)
            if sight.first:
                spans = tuple(clip_spans(spans, sight.first, sight.first + sight.tokens))
            runs.append(QueryRun(row + sight.row, sight.length, spans, sight.window_starts))
        row += segment.length
    return tuple(runs)


def _keys(
    moving: Sequence[Segment],
    mine: Sequence[Segment],
    window: int | None,
    requests: Mapping[str, KnownRequest],
    place: Place,
) -> tuple[tuple[KeyShare, ...], tuple[KeyRun, ...]]:
    """For keys that travel: each shard's share, and where the segments `mine` look in it.

    Without a window a request's segments look into one prefix; with one each has its own few tokens.
    """

    def key(segment: Segment) -> tuple[str, int]:
        return segment.request_id, 0 if window is None else segment.start

    wanted: dict[tuple[str, int], tuple[int, int]] = {}
    for segment in moving:
        _, until = wanted.get(key(segment), (0, 0))
        wanted[key(segment)] = window_start(segment.start, window), max(segment.unmasked_until, until)
    shares: list[KeyShare] = []
    runs: list[KeyRun] = []
    for shard in sorted(shard for shards in place.shards_of_pcp for shard in shards):
        spans: list[Span] = []
        offset: dict[tuple[str, int], int] = {}
        tokens = 0
        for name, (first, until) in wanted.items():
            table = requests[name[0]].table
            low, high = table.visible(shard, first), table.visible(shard, until)
            offset[name] = tokens - low
            spans += clip_spans(table.spans(shard, until), low, high)
            tokens += max(high - low, 0)
        shares.append(KeyShare(tuple(spans), tokens))
        row = 0
        for segment in mine:
            for sight in _sights(segment, requests[segment.request_id].table, shard, window):
                seen = Span(offset[key(segment)] + sight.first, sight.tokens)
                runs.append(KeyRun(shard, row + sight.row, sight.length, seen, sight.window_starts))
            row += segment.length
    return tuple(shares), tuple(runs)
