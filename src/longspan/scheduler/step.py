"""The construction of one step's plan: pages are placed and segments are cut as requests are added.

It owns the budget and the load of a single step; it must not choose which requests take part.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.attention.cost import ScheduleChooser
from longspan.attention.workload import PhaseWorkload
from longspan.cache.manager import CacheManager
from longspan.cache.pages import PageRef, PageTable
from longspan.cache.placement import home_shard, shard_for_decode, shard_for_page
from longspan.config import SchedulerConfig
from longspan.errors import EngineError
from longspan.parallel.grid import Grid
from longspan.plan.drafts import drafted_behind
from longspan.plan.plan import Admission, Fetch, NewPages, Segment, StepPlan, unmasked_until, window_start
from longspan.plan.source import Source
from longspan.scheduler.segments import Piece, join, room_for_chunk, split_chunk
from longspan.scheduler.sequence import SequenceState


class StepBuilder:
    """Collects what a `StepPlan` consists of, while the scheduler adds requests."""

    def __init__(
        self, config: SchedulerConfig, cache: CacheManager, grid: Grid, windows: Sequence[int | None], budget: int
    ) -> None:
        # tokens that may still be added
        self.budget = budget
        # whether a request was preempted for this step; then no request is admitted
        self.preempted = False
        self.segments: list[Segment] = []
        self._strictly_local = config.schedule == "local"
        self._local_context = config.local_limit
        # how many draft tokens the ranks compute with layers of the model
        self._drafts_of_model = config.speculative.tokens if config.speculative and config.speculative.by_model else 0
        self._cache = cache
        self._grid = grid
        self._rows = [0] * grid.pcp  # decode rows on each pcp index
        self._load = [0] * grid.pcp  # tokens on each pcp index
        self._admitted: list[Admission] = []
        self._new_pages: dict[str, list[PageRef]] = {}
        self.fetches: list[Fetch] = []
        self._windows = windows
        # for each pcp index, whether some shard is not that of all its ranks
        self._others = [any(shard != m for m in own for shard in range(grid.num_shards)) for own in grid.shards_of_pcp]
        # by phase (prefill or not), the workload of each layer group
        self._workloads = {prefill: [PhaseWorkload(grid.pcp) for _ in windows] for prefill in (False, True)}

    def admit(self, sequence: SequenceState) -> None:
        """Add a waiting request, with the pages of its prefix hit. A short request gets a home."""
        if self._strictly_local or len(sequence.tokens) <= self._local_context:
            held = {page.shard for page in sequence.table.pages}
            sequence.home = next(iter(held)) if len(held) == 1 else self._choose_home(sequence, held)
        history = tuple(sequence.tokens) if sequence.params.needs_history else ()
        self._admitted.append(
            Admission(
                sequence.request_id, sequence.num_prompt, sequence.seed, sequence.params,
                tuple(sequence.table.pages), history, sequence.for_peer,
            )
        )  # fmt: skip

    def add_decode(self, sequence: SequenceState, drafts: Sequence[int] = ()) -> bool:
        """Compute the request's one remaining token, and as many of its drafts as there are pages for.

        Each token is computed on the rank of its page. False if there is no page for the first token. There are pages
        for all positions that the tokens may have.
        """
        table, start = sequence.table, sequence.computed
        pieces: list[Piece] = []
        for position in range(start, start + sequence.slack + 1 + len(drafts)):
            number = position // table.page_size
            if number == len(table.pages):
                shard = self._decode_shard(sequence)
                if shard is None:
                    break
                self._place(sequence, shard)
            pieces.append(Piece(position, position + 1, self._grid.pcp_of_shard[table.pages[number].shard]))
        if pieces and self._drafts_of_model > 1:
            self._place_ahead(sequence, start + len(pieces) + self._drafts_of_model - 1)
        for piece in join(pieces) if len(pieces) > 1 else pieces:
            self._rows[piece.pcp] += piece.stop - piece.start
            self._add_segment(sequence, piece, prefill=False, drafts=drafts)
        return bool(pieces)

    def can_follow(self, sequence: SequenceState) -> bool:
        """Whether a pending token is sampled by the ranks that will compute it, so that nobody has to send it.

        False if the token needs a new page, which may be placed on any shard, and with penalties, which need every
        token of the output where the next one is sampled. With drafts, of which there is one shard: False if there is
        no page for the last position that the token may have, or if that is behind the request's end.
        """
        if sequence.pending and self._drafts_of_model:
            last = sequence.computed + sequence.slack
            missing = last // self._cache.page_size + 1 - len(sequence.table.pages)
            return sequence.pending == 1 and last < sequence.max_stored and missing <= self._cache.available(0)
        if not sequence.pending or self._grid.pcp == 1:
            return True
        if sequence.params.penalises:
            return False
        table = sequence.table
        has_page = sequence.computed < len(table.pages) * table.page_size
        return has_page and self._grid.pcp_of_shard[table.shard_of(sequence.computed)] == sequence.sampled_on

    def add_chunk(self, sequence: SequenceState, tokens: int) -> None:
        """Compute the next `tokens` tokens of a prefill, or as many as there are pages for."""
        start = sequence.computed
        pieces = self._pieces(sequence, start, tokens)
        for piece in pieces:
            self._place_until(piece.stop, sequence, self._grid.shards_of_pcp[piece.pcp])
        for piece in pieces:
            self._add_segment(sequence, piece, prefill=True)

    def add_fetch(self, sequence: SequenceState, number: int, source: Source) -> None:
        """Place pages for all tokens but the last, whose KV is fetched from another instance."""
        stop = len(sequence.tokens) - 1
        self._place_until(stop, sequence, range(self._cache.num_shards))
        self.fetches.append(Fetch(number, sequence.request_id, sequence.computed, stop, source))

    def drafted_behind(self, segment: Segment, table: PageTable) -> int:
        """How many tokens the ranks draft behind the last token of a segment, which this step samples."""
        if not self._drafts_of_model:
            return 0
        return drafted_behind(segment.stop - 1 + segment.slack, table, self._drafts_of_model)

    def build(self, step: int, finished: tuple[str, ...], chooser: ScheduleChooser) -> StepPlan:
        """The plan, with a schedule chosen for each phase and layer group."""
        saves, loads = self._cache.take_copies()
        rows = max(self._load)
        return StepPlan(
            step=step,
            saves=saves,
            loads=loads,
            finished=finished,
            admitted=tuple(self._admitted),
            new_pages=tuple(NewPages(request, tuple(pages)) for request, pages in self._new_pages.items()),
            segments=tuple(self.segments),
            decode_schedules=tuple(chooser.choose(workload, decode=True) for workload in self._workloads[False]),
            prefill_schedules=tuple(chooser.choose(workload, rows=rows) for workload in self._workloads[True]),
            fetches=tuple(self.fetches),
        )

    def _choose_home(self, sequence: SequenceState, held: set[int]) -> int | None:
        """The home of a request that starts; None if its prefix hit is on several shards, or if no shard fits."""
        if held:
            return None
        load = [rows + tokens for rows, tokens in zip(self._rows, self._load, strict=True)]
        least = sequence.max_pages if self._strictly_local else 0
        return home_shard(self._cache, self._grid.pcp_of_shard, load, sequence.pages_missing, least)

    def _decode_shard(self, sequence: SequenceState) -> int | None:
        """The shard of a decode token's new page: the home while the context is local. None without room."""
        home = sequence.home
        local = self._strictly_local or sequence.computed < self._local_context
        if home is not None and local and (self._cache.available(home) or self._strictly_local):
            return home if self._cache.available(home) else None
        sequence.home = None
        return shard_for_decode(self._cache, sequence.table, self._grid.pcp_of_shard, self._rows)

    def _pieces(self, sequence: SequenceState, start: int, tokens: int) -> list[Piece]:
        """Cut a chunk of up to `tokens` tokens. A home without room for all of it is given up, if that is allowed."""
        size = self._cache.page_size
        if sequence.home is not None:
            room = room_for_chunk(start, size, [self._cache.available(sequence.home)])
            if room >= tokens or self._strictly_local:
                stop = start + min(tokens, room)
                return [Piece(start, stop, self._grid.pcp_of_shard[sequence.home])] if stop > start else []
            sequence.home = None
        free = [sum(map(self._cache.available, shards)) for shards in self._grid.shards_of_pcp]
        tail = self._grid.pcp_of_shard[sequence.table.shard_of(start)] if start % size else None
        stop = start + min(tokens, room_for_chunk(start, size, free))
        return split_chunk(start, stop, size, free, self._load, tail) if stop > start else []

    def _place_until(self, stop: int, sequence: SequenceState, shards: Sequence[int]) -> None:
        """Place pages for all positions before `stop`: on the request's home, or else on `shards`."""
        table, candidates = sequence.table, shards if sequence.home is None else (sequence.home,)
        while len(table.pages) * table.page_size < stop:
            shard = shard_for_page(self._cache, table, candidates)
            if shard is None:
                raise EngineError(f"no room on shards {candidates} for positions up to {stop}")
            self._place(sequence, shard)

    def _place_ahead(self, sequence: SequenceState, stop: int) -> None:
        """Place pages for positions before `stop` that the ranks need to draft several tokens, as far as there is room.

        Where a page is missing fewer tokens are drafted.
        """
        table = sequence.table
        while len(table.pages) * table.page_size < min(stop, sequence.max_stored):
            shard = self._decode_shard(sequence)
            if shard is None:
                return
            self._place(sequence, shard)

    def _place(self, sequence: SequenceState, shard: int) -> None:
        page = self._cache.allocate(shard, sequence.table.last_index(shard))
        sequence.table.append(page)
        self._new_pages.setdefault(sequence.request_id, []).append(page)

    def _add_segment(self, sequence: SequenceState, piece: Piece, prefill: bool, drafts: Sequence[int] = ()) -> None:
        start, stop, pcp = piece
        slack = 0 if prefill else sequence.slack
        length, known = stop - start - slack, len(sequence.tokens)
        token_ids: tuple[int, ...] = ()
        if not sequence.pending:
            behind = _cut(drafts, piece, known) if drafts else ()
            token_ids = (*sequence.tokens[start:stop], *behind)
        follows = self._drafts_of_model > 0 and stop < known
        self.segments.append(
            Segment(
                request_id=sequence.request_id,
                start=start,
                token_ids=token_ids,
                pcp=pcp,
                prefill=prefill,
                num_remote_groups=self._remote_groups(sequence, piece, length, prefill) if self._others[pcp] else 0,
                sample=min(length, max(0, start + length + 1 - known - sequence.pending)),
                scores=start < sequence.num_prompt and sequence.params.prompt_logprobs is not None,
                pending=length if sequence.pending else 0,
                slack=slack,
                next_token=sequence.tokens[stop] if follows else None,
            )
        )
        self._load[pcp] += length
        self.budget -= length

    def _remote_groups(self, sequence: SequenceState, piece: Piece, length: int, prefill: bool) -> int:
        """See `Segment.num_remote_groups`. Adds the segment to the workloads of these groups."""
        found = 0
        # windows are in descending order: what needs no other shard here needs none in the groups that follow
        for window, workload in zip(self._windows, self._workloads[prefill], strict=True):
            visible = self._visible(sequence.table, piece, window)
            if not self._reaches_out(piece.pcp, visible):
                break
            key = sequence.request_id if window is None else (sequence.request_id, piece.start)
            workload.add(key, piece.pcp, length, visible)
            found += 1
        return found

    def _visible(self, table: PageTable, piece: Piece, window: int | None) -> dict[int, int]:
        """Number of tokens that a segment's unmasked attention sees on each shard, without shards that have none."""
        first, until = window_start(piece.start, window), unmasked_until(piece.start, piece.stop)
        counts = {
            shard: table.visible(shard, until) - (table.visible(shard, first) if first else 0)
            for shard in range(self._cache.num_shards)
        }
        return {shard: tokens for shard, tokens in counts.items() if tokens > 0}

    def _reaches_out(self, pcp: int, visible: dict[int, int]) -> bool:
        """Whether some rank of the TP group `pcp` does not store all of the visible tokens."""
        return any(shard != member for member in self._grid.shards_of_pcp[pcp] for shard in visible)


def _cut(drafts: Sequence[int], piece: Piece, first: int) -> Sequence[int]:
    """The drafts that are in a piece. `first` is the position of the first draft."""
    return drafts[max(0, piece.start - first) : max(0, piece.stop - first)]
