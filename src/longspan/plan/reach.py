"""What a rank's rows attend to off the diagonal: which slots of which shard, in each layer group (idea 4).

It owns the translation from segments and page tables to runs of rows and slots. It computes with plain integers and
must not touch tensors or communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from longspan.cache.pages import PageTable, Span, clip_spans
from longspan.plan.mirror import KnownRequest
from longspan.plan.plan import Segment, unmasked_until, window_start

Moves = Literal["queries", "keys", "signals"]
"""What travels under a schedule. A schedule under which nothing travels has None.

Signals tell that keys are written: each rank then reads the pages of all in place, as if they were its own.
"""

_WINDOW_ROWS = 256  # most rows of one run in a layer with a window; bounds the height of the mask


@dataclass(frozen=True)
class QueryRun:
    """Query rows [row, row + length) of one segment, and the slots of this shard that they attend to."""

    # first row
    row: int
    # number of rows
    length: int
    # the slots, in position order
    spans: tuple[Span, ...]
    # for each row, how many of the first slots its window leaves out; None if it leaves out none
    window_starts: tuple[int, ...] | None = None
    # whether the last `length` slots are those of the rows' own tokens, of which a row sees those up to its own
    causal: bool = False

    @property
    def tokens(self) -> int:
        """Number of slots in `spans`."""
        return sum(span.length for span in self.spans)

    @property
    def ends(self) -> Sequence[int]:
        """For each row, the number of slots up to the last one that it sees."""
        tokens = self.tokens
        return range(tokens - self.length + 1, tokens + 1) if self.causal else (tokens,) * self.length


@dataclass(frozen=True)
class QueryBlock:
    """The travelling query rows of one pcp index."""

    # number of rows
    rows: int
    # what these rows attend to on this shard; empty where keys travel
    runs: Sequence[QueryRun]


@dataclass(frozen=True)
class KeyShare:
    """The keys and values that one shard sends, for schedules under which keys travel."""

    # slots of the tokens that some travelling segment needs
    spans: tuple[Span, ...]
    # number of these tokens
    tokens: int


@dataclass(frozen=True)
class KeyRun:
    """Query rows [row, row + length) of this rank, and the tokens of one shard's `KeyShare` that they attend to."""

    # the shard that sends the tokens
    shard: int
    # first row, counted among the travelling rows of the phase
    row: int
    # number of rows
    length: int
    # the tokens, as indices into the share
    span: Span
    # as in `QueryRun`, counted from the start of `span`
    window_starts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reach:
    """What the rows of one phase attend to off the diagonal, in the layers of one group.

    The first rows are local: all pages they see are on this rank. The others are called travelling rows, because
    either their queries or the keys they see are sent between ranks. Runs that are causal have the diagonal in them.

    Where ranks read the pages of all in place, all rows are local, unless the keys of some are written in the same
    step: then all rows travel, and wait for these keys.
    """

    # name of the schedule
    schedule: str
    # number of local rows, so the index of the first travelling row in the phase
    travel: int
    # what the local rows attend to; if `in_place` what all rows of the phase attend to
    own: Sequence[QueryRun]
    # for each pcp index its travelling rows, counted from 0; their runs are empty where keys travel
    blocks: tuple[QueryBlock, ...]
    # what each shard sends; empty unless keys travel
    shares: tuple[KeyShare, ...]
    # what this rank's travelling rows attend to in the shares; empty unless keys travel
    key_runs: tuple[KeyRun, ...]
    # whether `own` has slots of all shards: see `Place.first_slots`
    in_place: bool = False

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Number of travelling rows of every pcp index; the same on all ranks."""
        return tuple(block.rows for block in self.blocks)


@dataclass(frozen=True)
class Place:
    """The position of a rank in the context group."""

    # the pcp index whose tokens the rank computes
    pcp: int
    # the shard that the rank stores
    shard: int
    # for every pcp index, the shards that its ranks store
    shards_of_pcp: tuple[tuple[int, ...], ...]
    # for every shard, the number of its first slot among the slots that this rank reads in place: its own come first,
    # then those of the others. Empty if it reads its own only
    first_slots: tuple[int, ...] = ()


def first_slots(slots: Sequence[int], own: int) -> tuple[int, ...]:
    """See `Place.first_slots`, of shards with these numbers of slots, for a rank that stores shard `own`."""
    found = [0] * len(slots)
    after = slots[own]
    for shard, count in enumerate(slots):
        if shard != own:
            found[shard] = after
            after += count
    return tuple(found)


class _VisibleTokens(NamedTuple):
    """Rows [row, row + length) of a segment see tokens [first, first + tokens) of a shard."""

    # first row, counted from the segment's start
    row: int
    # number of rows
    length: int
    # first token, counted among the request's tokens on the shard
    first: int
    # number of tokens
    tokens: int
    # row i skips the first `window_starts[i]` of these tokens; None if no row skips any
    window_starts: tuple[int, ...] | None


def reach(
    schedule: str,
    group: int,
    window: int | None,
    members: Sequence[Segment],
    mine: Sequence[Segment],
    requests: Mapping[str, KnownRequest],
    place: Place,
    moves: Mapping[str, Moves | None],
    causal_runs: bool = False,
    through_shards: bool = False,
) -> Reach:
    """What this rank's segments of one phase see off the diagonal, in the layers of one group.

    Args:
        schedule: the schedule of this phase and layer group.
        group: number of the layer group.
        window: positions that a row of this layer group sees, its own included; None for all.
        members: the phase's segments on all ranks.
        mine: those of them that this rank computes, in the order of its rows.
        requests: the page tables.
        place: the position of this rank.
        moves: what travels under each schedule, by its name.
        causal_runs: whether segments read their own tokens from the cache, where all of these are on this shard or
            ranks read the pages of all in place.
        through_shards: whether segments whose queries travel read their own tokens from the shards that store these.
    """
    if moves[schedule] == "signals":
        return _reach_in_place(schedule, window, members, mine, requests, place, causal_runs)
    local = [segment for segment in mine if segment.num_remote_groups <= group]
    moving = sorted(
        (s for s in members if s.num_remote_groups > group), key=lambda s: s.num_remote_groups
    )  # as the ranks that compute them order their rows
    by_pcp = [[s for s in moving if s.pcp == pcp] for pcp in range(len(place.shards_of_pcp))]
    keys_travel = moves[schedule] == "keys"
    shares, key_runs = _keys(moving, by_pcp[place.pcp], window, requests, place) if keys_travel else ((), ())
    return Reach(
        schedule=schedule,
        travel=sum(segment.length for segment in local),
        own=_runs(local, window, requests, place.shard, causal_runs),
        blocks=tuple(
            QueryBlock(
                sum(s.length for s in block),
                () if keys_travel else _runs(block, window, requests, place.shard, through_shards=through_shards),
            )
            for block in by_pcp
        ),
        shares=shares,
        key_runs=key_runs,
    )


def _reach_in_place(
    schedule: str,
    window: int | None,
    members: Sequence[Segment],
    mine: Sequence[Segment],
    requests: Mapping[str, KnownRequest],
    place: Place,
    causal_runs: bool = False,
) -> Reach:
    """What `reach` gives where ranks read the pages of all in place. Arguments are as there."""
    runs: list[QueryRun] = []
    row = 0
    for segment in mine:
        runs += _runs_in_place(row, segment, window, requests[segment.request_id].table, place.first_slots, causal_runs)
        row += segment.length
    waits = waits_for_keys(members, place)
    rows = [sum(s.length for s in members if s.pcp == pcp) if waits else 0 for pcp in range(len(place.shards_of_pcp))]
    blocks = tuple(QueryBlock(count, ()) for count in rows)
    return Reach(schedule, 0 if waits else row, tuple(runs), blocks, (), (), in_place=True)


def waits_for_keys(members: Sequence[Segment], place: Place) -> bool:
    """Whether some segment of a phase sees keys that another rank writes in the same step.

    Members of one DCP group store each other's tokens, and the segments of one request see those before them.
    """
    if len(place.shards_of_pcp[0]) > 1:
        return True
    pcp_of: dict[str, int] = {}
    return any(pcp_of.setdefault(segment.request_id, segment.pcp) != segment.pcp for segment in members)


def _runs_in_place(
    first_row: int, segment: Segment, window: int | None, table: PageTable, first_slots: Sequence[int], causal: bool
) -> Iterator[QueryRun]:
    """What a segment sees of all shards. Without a window its earlier tokens are in order of shards: fewer spans."""
    until = segment.unmasked_until
    causal = causal and until < segment.stop
    if window is None:
        spans = [
            Span(first + span.slot, span.length)
            for shard, first in enumerate(first_slots)
            for span in table.spans(shard, until)
        ]
        if causal:
            spans += table.spans_of_all(segment.start, segment.stop, first_slots)
        if spans:
            yield QueryRun(first_row, segment.length, tuple(spans), None, causal)
        return
    for row in range(0, segment.length, _WINDOW_ROWS):
        positions = range(segment.start + row, min(segment.start + row + _WINDOW_ROWS, segment.stop))
        starts = [window_start(position, window) for position in positions]
        stop = positions[-1] + 1 if causal else until
        seeing = tuple(start - starts[0] for start in starts if start < stop)
        if not seeing:
            return
        spans = table.spans_of_all(starts[0], stop, first_slots)
        yield QueryRun(first_row + row, len(seeing), tuple(spans), seeing if seeing[-1] else None, causal)


def reads_itself(segment: Segment, table: PageTable, shard: int) -> bool:
    """Whether a segment of several tokens is local in all layer groups and has all its own tokens on this shard."""
    if segment.length == 1 or segment.num_remote_groups:
        return False
    return table.visible(shard, segment.stop) - table.visible(shard, segment.start) == segment.length


def _visible_tokens(
    start: int, stop: int, table: PageTable, shard: int, window: int | None, causal: bool = False
) -> Iterator[_VisibleTokens]:
    """What the rows of positions [start, stop) see of a shard's tokens; if `causal` their own are among these.

    The tokens before a row's window are a prefix of the shard's tokens, so one number a row describes the window.
    """
    until = table.visible(shard, stop if causal else unmasked_until(start, stop))
    if window is None:
        if until:
            yield _VisibleTokens(0, stop - start, 0, until, None)
        return
    for row in range(0, stop - start, _WINDOW_ROWS):
        positions = range(start + row, min(start + row + _WINDOW_ROWS, stop))
        window_starts = [table.visible(shard, window_start(position, window)) for position in positions]
        first = window_starts[0]
        if causal:
            until = table.visible(shard, positions[-1] + 1)
        seeing = tuple(low - first for low in window_starts if low < until)
        if not seeing:
            return
        yield _VisibleTokens(row, len(seeing), first, until - first, seeing if seeing[-1] else None)


def _runs(
    segments: Sequence[Segment],
    window: int | None,
    requests: Mapping[str, KnownRequest],
    shard: int,
    causal_runs: bool = False,
    through_shards: bool = False,
) -> tuple[QueryRun, ...]:
    """What segments see of a shard: their own tokens too, where `causal_runs` or `through_shards` says so."""
    runs: list[QueryRun] = []
    row = 0
    for segment in segments:
        table = requests[segment.request_id].table
        whole = segment.start, segment.stop, causal_runs and reads_itself(segment, table, shard)
        for start, stop, causal in _pieces(segment, table, shard) if through_shards else [whole]:
            for visible in _visible_tokens(start, stop, table, shard, window, causal):
                spans = table.spans(shard, stop if causal else unmasked_until(start, stop))
                if window is not None:
                    spans = tuple(clip_spans(spans, visible.first, visible.first + visible.tokens))
                first = row + start - segment.start + visible.row
                runs.append(QueryRun(first, visible.length, spans, visible.window_starts, causal))
        row += segment.length
    return tuple(runs)


def _pieces(segment: Segment, table: PageTable, shard: int) -> Iterator[tuple[int, int, bool]]:
    """Cut a segment into positions that the shard stores, and others: (start, stop, whether a piece is causal there).

    KV is written before attention, so a row sees all tokens up to its own on the shards that store them. Those of a
    piece that another shard stores are not here, and a lone token needs no mask.
    """
    at = segment.start
    for offset, span in table.slots(shard, segment.start, segment.stop):
        start = segment.start + offset
        if at < start:
            yield at, start, False
        at = start + span.length
        yield start, at, span.length > 1
    if at < segment.stop:
        yield at, segment.stop, False


def _keys(
    moving: Sequence[Segment],
    mine: Sequence[Segment],
    window: int | None,
    requests: Mapping[str, KnownRequest],
    place: Place,
) -> tuple[tuple[KeyShare, ...], tuple[KeyRun, ...]]:
    """For schedules under which keys travel: what each shard sends, and what the segments `mine` see of it.

    Without a window the segments of one request see prefixes of the same tokens, which are sent once. With a window
    each segment has a range of its own.
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
            table = requests[segment.request_id].table
            for visible in _visible_tokens(segment.start, segment.stop, table, shard, window):
                seen = Span(offset[key(segment)] + visible.first, visible.tokens)
                runs.append(KeyRun(shard, row + visible.row, visible.length, seen, visible.window_starts))
            row += segment.length
    return tuple(shares), tuple(runs)
