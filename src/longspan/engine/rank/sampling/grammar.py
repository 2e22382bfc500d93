"""Token masks of grammars (structured output), computed where tokens are sampled.

It owns the grammar library's matchers, which follow drafts and take them back; it must not know of ranks or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from longspan.engine.rank.sampling.rows import both, every_token
from longspan.errors import RequestError

_MAX_KEPT = 16  # grammars whose matchers are copied, not made again


class Vocabulary:
    """The model's tokens in the form of the grammar library. Threads of several ranks may share it.

    Reading them takes seconds. It happens for the first grammar, unless `read_ahead` began it.
    """

    def __init__(self, load_serialised: Callable[[], str | None], size: int, eos_token_ids: Sequence[int]) -> None:
        self._load = load_serialised
        # logits of a row
        self.size = size
        # tokens that end a completion, by the model's configuration
        self.eos_token_ids = tuple(eos_token_ids)
        self._tokens: Any = None
        self._made: OrderedDict[str, Any] = OrderedDict()  # a matcher at its start, by grammar
        self._reading, self._making = Lock(), Lock()

    def read_ahead(self) -> Thread:
        """Read in a thread of its own, so that the first grammar does not keep a rank from its steps."""

        def read() -> None:
            with suppress(Exception):  # the first grammar tries again and tells why it fails
                self._read_once()

        thread = Thread(target=read, name="longspan-vocabulary")
        thread.start()
        return thread

    def matcher(self, grammar: str) -> Matcher:
        """A matcher for a new output. If the grammar cannot be read, `Matcher.allowed` raises the reason."""
        return Matcher(lambda alone: self._begin(grammar, alone), self.size)

    def _read_once(self) -> Any:
        with self._reading:
            if self._tokens is None:
                self._tokens = self._read()
            return self._tokens

    def _begin(self, grammar: str, alone: bool) -> Any:
        """A matcher at its start, `alone`: with a lexer of its own. Making one may take half a second.

        Others are copies of one, because `n` completions share a grammar.
        """
        from llguidance import LLMatcher

        with self._making:
            if alone:
                self._made.pop(grammar, None)  # its lexer may have reached its limits
                return LLMatcher(self._read_once(), grammar)
            if grammar not in self._made:
                self._made[grammar] = LLMatcher(self._read_once(), grammar)
            self._made.move_to_end(grammar)
            while len(self._made) > _MAX_KEPT:
                self._made.popitem(last=False)
            return self._made[grammar].deep_copy()

    def _read(self) -> Any:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        serialised = self._load()
        if serialised is None:
            raise RequestError("grammar", "...", "needs the model's tokenizer, and it has none", "leave it out")
        size = max(self.size, Tokenizer.from_str(serialised).get_vocab_size())
        return LLTokenizer(serialised, n_vocab=size, eos_token=list(self.eos_token_ids) or None)


class Matcher:
    """Follows one output under a grammar. Drafts at the end of the output may be taken back.

    The library's lexer has limits, and its copies share one: so if a matcher fails, drafts that are wrong may be the
    reason, or other outputs. Then it begins again with a lexer of its own, and reads no more drafts.
    """

    def __init__(self, begin: Callable[[bool], Any], size: int) -> None:
        # makes a matcher of the library at the start of the grammar; True: with a lexer of its own
        self._begin = begin
        self._size = size
        # set once the grammar can never be followed any further
        self._failure: RequestError | None = None
        self._restart(alone=False)

    def allowed(self, output_token_ids: Sequence[int], drafts: int = 0) -> bytes:
        """Tokens that may follow the output, as `rows.token_bits`. Its last `drafts` tokens are drafts.

        The output must begin with those tokens of the last call's that were no drafts. Raises `RequestError` if the
        grammar does not allow these drafts, or cannot be followed any further.
        """
        if self._failure is not None:
            raise self._failure
        _require(not (drafts and self._alone), lambda: "it reads no drafts any more")
        try:
            return self._mask(output_token_ids, drafts)
        except RequestError as error:
            if drafts:
                self._recover()
            elif self._alone:
                self._failure = error
            else:
                self._restart(alone=True)
                return self.allowed(output_token_ids)
            raise

    def count_allowed(self, output_token_ids: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of the first `drafts` the grammar allows behind the output, in which there are no drafts."""
        if self._failure is not None or self._alone:
            return 0
        try:
            self._follow(output_token_ids, 0)
        except RequestError as error:
            self._failure = error
            return 0
        count = 0 if self._matcher.is_stopped() else self._matcher.validate_tokens(list(drafts))
        self._recover()
        return int(count)

    def _recover(self) -> None:
        """Begin again if drafts were too much for the library."""
        if self._matcher.is_error():
            self._restart(alone=True)

    def _restart(self, alone: bool) -> None:
        """Begin before the output."""
        # whether its lexer is its own
        self._alone = alone
        # tokens of the output that have been read and are no drafts
        self._settled = 0
        # drafts that have been read behind them
        self._drafts: list[int] = []
        # how many of these have moved the matcher: none does behind the end of the grammar
        self._consumed = 0
        try:
            self._matcher: Any = self._begin(alone)
        except Exception as error:  # an error of the library must fail this request only, not the rank
            self._failure = _cannot_follow(f"{type(error).__name__}: {error}")

    def _mask(self, output: Sequence[int], drafts: int) -> bytes:
        """See `allowed`."""
        self._follow(output, drafts)
        bits = bytes(self._matcher.compute_bitmask())
        _require(not self._matcher.is_error(), self._matcher.get_error)
        allowed = both(every_token(self._size), bits[: -(-self._size // 8)])
        _require(allowed.count(0) < len(allowed), lambda: "no token may follow")
        return allowed

    def _follow(self, output: Sequence[int], drafts: int) -> None:
        """Bring the matcher behind the output: drafts that proved wrong are taken back, what is new is read."""
        fresh = list(output[self._settled :])
        differ = (n for n, (a, b) in enumerate(zip(self._drafts, fresh, strict=False)) if a != b)
        same = next(differ, min(len(self._drafts), len(fresh)))
        if self._consumed > same:
            _require(self._matcher.rollback(self._consumed - same), self._matcher.get_error)
            self._consumed = same
        added = fresh[same:]
        read = 0 if self._matcher.is_stopped() else self._matcher.try_consume_tokens(added)
        self._consumed += read
        self._drafts = fresh[: same + read]
        _require(not self._matcher.is_error(), self._matcher.get_error)
        _require(read == len(added) or self._matcher.is_stopped(), lambda: f"token {added[read]} is not allowed")
        settled = max(0, len(fresh) - drafts)
        self._settled += settled
        self._drafts = fresh[settled:]
        self._consumed = max(0, self._consumed - settled)


def _require(ok: bool, problem: Callable[[], str]) -> None:
    if not ok:
        raise _cannot_follow(problem())


def _cannot_follow(problem: str) -> RequestError:
    return RequestError("response_format", "...", f"cannot be followed ({problem})", "use a simpler schema")
