"""Token masks of grammars (structured output), computed where tokens are sampled.

It owns the grammar library's matchers; it must not know of ranks or requests.
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
        try:
            return Matcher(self._start(grammar).deep_copy(), self.size)
        except Exception as error:  # an error of the library must fail this request only, not the rank
            return Matcher(None, self.size, f"{type(error).__name__}: {error}")

    def _read_once(self) -> Any:
        with self._reading:
            if self._tokens is None:
                self._tokens = self._read()
            return self._tokens

    def _start(self, grammar: str) -> Any:
        """A matcher at its start. Making one may take half a second, and `n` completions share a grammar."""
        from llguidance import LLMatcher

        with self._making:
            if grammar not in self._made:
                self._made[grammar] = LLMatcher(self._read_once(), grammar)
            self._made.move_to_end(grammar)
            while len(self._made) > _MAX_KEPT:
                self._made.popitem(last=False)
            return self._made[grammar]

    def _read(self) -> Any:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        serialised = self._load()
        if serialised is None:
            raise RequestError("grammar", "...", "needs the model's tokenizer, and it has none", "leave it out")
        size = max(self.size, Tokenizer.from_str(serialised).get_vocab_size())
        return LLTokenizer(serialised, n_vocab=size, eos_token=list(self.eos_token_ids) or None)


class Matcher:
    """Follows one output under a grammar."""

    def __init__(self, matcher: Any, size: int, failure: str = "") -> None:
        self._matcher = matcher
        self._failure = failure
        self._size = size
        self._seen = 0

    def allowed(self, output_token_ids: Sequence[int]) -> bytes:
        """Tokens that may follow the output, as `rows.token_bits`. The output must begin with that of the last call.

        Raises `RequestError` if the grammar cannot be followed any further.
        """
        self._require(not self._failure, lambda: self._failure)
        fresh = list(output_token_ids[self._seen :])
        if fresh and not self._matcher.is_stopped():
            self._matcher.consume_tokens(fresh)
        self._seen = len(output_token_ids)
        bits = bytes(self._matcher.compute_bitmask())
        self._require(not self._matcher.is_error(), self._matcher.get_error)
        allowed = both(every_token(self._size), bits[: -(-self._size // 8)])
        self._require(allowed.count(0) < len(allowed), lambda: "no token may follow")
        return allowed

    def _require(self, ok: bool, problem: Callable[[], str]) -> None:
        if not ok:
            self._failure = problem()
            raise RequestError(
                "response_format", "...", f"cannot be followed ({self._failure})", "use a simpler schema"
            )
