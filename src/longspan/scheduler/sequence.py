"""The scheduler's state of one request: tokens, pages, and how far it is computed.

It owns this state between steps; it must not know about budgets or other requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import structs

from longspan.cache.pages import PageTable
from longspan.cache.prefix import Key, page_key, root_key
from longspan.config import SchedulerConfig
from longspan.plan.plan import Segment
from longspan.plan.source import Source
from longspan.request import CoreRequest, SampledToken
from longspan.scheduler.acceptance import DraftCounts
from longspan.scheduler.draft_length import DraftLength
from longspan.scheduler.lookup import PromptLookup
from longspan.scheduler.progress import Progress, right_tokens


class DraftGrammar(Protocol):
    """Follows one output under a grammar, to tell which drafts it allows."""

    def count_allowed(self, output_token_ids: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of the first `drafts` may follow the output, which begins with that of the last call."""


Grammars = Callable[[str], DraftGrammar]
"""Begins to follow a grammar."""
_NO_DRAFTS = DraftCounts()


class SequenceState:
    """A request's tokens, page table and progress."""

    def __init__(self, request: CoreRequest, table: PageTable, source: Source | None = None, keys: Iterable[Key] = ()):
        self.request_id = request.request_id
        # the user's request that it belongs to
        self.parent_id = request.parent_id or request.request_id
        # the prompt, then the output so far
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.params = request.params
        self.seed = request.seed
        self.table = table
        # number of tokens whose KV is stored, or will be when the steps in flight are done: without drafts in these
        self.computed = 0
        # tokens of its prefix hit when it was first admitted; None before
        self.cached_tokens: int | None = None
        # most tokens whose KV it can store; the last token's is never needed
        self.max_stored = self.num_prompt + request.max_tokens - 1
        # the instance that computes its prompt; None for this one
        self.source = source
        # whether another instance will fetch its pages
        self.for_peer = request.for_peer
        # number of its pages that are in the prefix cache
        self.published = 0
        # number of steps in flight that compute tokens of it
        self.in_flight = 0
        # number of tokens that steps in flight sample, and that may be computed before their ids are known
        self.pending = 0
        # pcp index on which the last of them is sampled
        self.sampled_on = 0
        # number of drafts in the last step that it was in
        self.verifying = 0
        # number of tokens that the ranks draft in that step
        self.drafting = 0
        # the shard that holds a short context whole; None if it is spread
        self.home: int | None = None
        self.lookup = PromptLookup()
        # tokens that the ranks expect after its last one, where they draft
        self.expected: Sequence[int] = ()
        # how many drafts are worth computing
        self.draft_length = DraftLength()
        # tells which drafts its grammar allows; None before there were any
        self._grammar: DraftGrammar | None = None
        # keys of its first full pages, as far as they were needed
        self._keys = list(keys)

    @property
    def length(self) -> int:
        """Number of tokens, the pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def slack(self) -> int:
        """How many positions later than `computed` its next token may be: as many as drafts in flight may be right."""
        return self.verifying if self.pending else 0

    @property
    def remaining(self) -> int:
        """Number of tokens not computed yet: 1 for a decoding request, 0 while its next token is in flight."""
        return len(self.tokens) + self.pending - self.computed  # not `length`: read for every request of every step

    @property
    def pages_missing(self) -> int:
        """Number of pages that its tokens need beyond those in the table."""
        return max(0, -(-self.length // self.table.page_size) - len(self.table.pages))

    @property
    def max_pages(self) -> int:
        """Most pages that it can hold."""
        return -(-self.max_stored // self.table.page_size)

    def draft(self, config: SchedulerConfig, most: int, rows: int, grammars: Grammars | None) -> Sequence[int]:
        """Up to `most` draft tokens, as many as are worth computing beside `rows`: see `DraftLength.choose`.

        The first one that the request's grammar does not allow, and those behind it, are left out. Where only the ranks
        know the drafts, zeros stand for them.
        """
        how = config.speculative
        if how is None:
            return ()
        room = min(most, self.drafting if self.pending else how.tokens, self.max_stored - self.length - self.slack)
        if room <= 0:
            return ()
        count = self.draft_length.choose(room, rows, config.fixed_rows)
        if self.pending:
            return (0,) * count
        drafts = self.expected[:count] if how.by_model else self.lookup.draft(self.tokens, count)
        if not drafts or self.params.grammar is None or grammars is None:
            return drafts
        if self._grammar is None:
            self._grammar = grammars(self.params.grammar)
        return drafts[: self._grammar.count_allowed(self.tokens[self.num_prompt :], drafts)]

    def may_be_planned_ahead(self, with_drafts: bool) -> bool:
        """Whether the token that it samples next may be computed before its id is known.

        Not if a grammar or bad words need the id, nor if the length ends the request with this token. With drafts not
        if any token may not be sampled: which these are depends on its position, which is not known either.
        """
        needs_host = self.params.constrains if with_drafts else self.params.needs_output
        return not needs_host and self.length < self.max_stored

    def await_token(self, segment: Segment, drafting: int) -> None:
        """Its last segment samples a token that may be computed before its id is known; ranks draft `drafting` more."""
        self.pending += 1
        self.sampled_on, self.verifying, self.drafting = segment.pcp, segment.sample - 1, drafting

    def take(
        self, done: Progress, sampled: Sequence[SampledToken], drafts: Mapping[tuple[str, int], Sequence[int]]
    ) -> tuple[list[SampledToken], DraftCounts]:
        """Take the oldest step in flight: append the tokens that are right, and return them and its drafts, counted.

        Where the step was planned before it was known where it begins, positions in its result are those of the plan:
        too small by as many drafts of the step before as were right.

        Args:
            done: what the step does for the request.
            sampled: the tokens that it has sampled.
            drafts: by request and position of a sampled token, what the ranks draft behind it.
        """
        self.in_flight -= 1
        if not (done.num_drafts or self.drafting or drafts or self.for_peer):
            right = list(sampled[:1])  # nothing is drafted: what follows comes to the same
            self.pending = max(0, self.pending - len(right))
            self.tokens += [token.token_id for token in right]
            return right, _NO_DRAFTS
        verified = done.drafts or self.expected[: done.num_drafts]
        given_up = self.for_peer and not self.table.pages  # preempted meanwhile: its pages are what is wanted
        right = [] if given_up else right_tokens(sampled, verified)
        self.pending = max(0, self.pending - bool(right))
        if self.computed and done.num_drafts:  # it is 0 if the request was preempted meanwhile
            self.computed += len(right) - 1  # slots of wrong drafts are overwritten
        counts = _NO_DRAFTS
        if verified:
            accepted = max(0, len(right) - 1)
            counts = DraftCounts.of_step(len(verified), accepted)
            self.draft_length.add(len(verified), accepted)
        if right:
            self.expected = drafts.get((self.request_id, right[-1].position), ())
        if self.drafting:
            first = len(self.tokens) - self.num_prompt
            right = [structs.replace(token, position=number) for number, token in enumerate(right, first)]
        self.tokens += [token.token_id for token in right]
        return right, counts

    def restart(self, new_table: Callable[[], PageTable]) -> None:
        """Start again with an empty page table; the caller has released the pages. Tokens are kept."""
        self.table = new_table()
        self.computed = 0
        self.pending = 0
        self.published = 0
        self.home = None
        self.expected = ()

    def page_keys(self, first: int, count: int, root: Key) -> Sequence[Key]:
        """Keys of the full pages [first, count). `root` is the parent of the first one; a cache salt changes it."""
        size, salt = self.table.page_size, self.params.cache_salt
        while len(self._keys) < count:
            parent = self._keys[-1] if self._keys else root_key(root, salt) if salt else root
            start = len(self._keys) * size
            self._keys.append(page_key(parent, self.tokens[start : start + size]))
        return self._keys[first:count]
