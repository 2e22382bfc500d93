"""One request as the scheduler sees it: tokens, pages and how far it is computed.

It owns per-request state between steps; it must not know about budgets or other requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from longspan.cache.pages import PageTable
from longspan.cache.prefix import Key, page_key, root_key
from longspan.plan.source import Source
from longspan.request import CoreRequest
from longspan.scheduler.lookup import PromptLookup


class SequenceState:
    """A request's tokens (prompt, then output), page table and progress.

    `computed` counts tokens whose KV is stored or will be by the steps in flight, of which `in_flight` have this
    request; `pending` counts tokens that they sample, the last on pcp index `sampled_on`, and that may be computed
    before they are known; `max_stored` bounds them, `cached_tokens` are those that the prefix cache had when the
    request was first admitted (None before), `published` the pages other requests can find. `home` is the one shard a
    short context lives on, None once it spreads; `source` the instance that computes its prompt, None if this one does;
    `for_peer` says that another one will fetch its pages.
    """

    def __init__(self, request: CoreRequest, table: PageTable, source: Source | None = None, keys: Iterable[Key] = ()):
        self.request_id = request.request_id
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.params = request.params
        self.seed = request.seed
        self.table = table
        self.computed = 0
        self.cached_tokens: int | None = None
        self.max_stored = self.num_prompt + request.max_tokens - 1  # the last token's KV is never needed
        self.source = source
        self.for_peer = request.for_peer
        self.published = 0
        self.in_flight = 0
        self.pending = 0
        self.sampled_on = 0
        self.home: int | None = None
        self.lookup = PromptLookup()
        self._keys = list(keys)  # of its first pages

    @property
    def length(self) -> int:
        """Its tokens, with those that are pending."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens not yet computed: 1 for a request that decodes, less while its next ones are in flight."""
        return self.length - self.computed

    @property
    def pages_missing(self) -> int:
        """Pages its present tokens still need."""
        return max(0, -(-self.length // self.table.page_size) - len(self.table.pages))

    @property
    def max_pages(self) -> int:
        """Pages it can ever hold."""
        return -(-self.max_stored // self.table.page_size)

    def draft(self, count: int) -> list[int]:
        """Tokens that may come next; none where a grammar binds them, whose state cannot be taken back."""
        room = min(count, self.max_stored - len(self.tokens))
        return self.lookup.draft(self.tokens, room) if room > 0 and self.params.grammar is None else []

    @property
    def may_be_planned_ahead(self) -> bool:
        """Whether the token it samples next may be computed before it is known: nothing looks back at it, and it is not
        the last one by length."""
        return not self.params.needs_history and self.params.grammar is None and self.length < self.max_stored

    def restart(self, new_table: Callable[[], PageTable]) -> None:
        """Forget the pages: the request is computed again from its first token (or a prefix hit)."""
        self.table = new_table()
        self.computed = 0
        self.pending = 0
        self.published = 0
        self.home = None

    def page_keys(self, first: int, count: int, root: Key) -> Sequence[Key]:
        """Content keys of whole pages [first, count); those of one cache salt are like no others."""
        size, salt = self.table.page_size, self.params.cache_salt
        while len(self._keys) < count:
            parent = self._keys[-1] if self._keys else root_key(root, salt) if salt else root
            start = len(self._keys) * size
            self._keys.append(page_key(parent, self.tokens[start : start + size]))
        return self._keys[first:count]
