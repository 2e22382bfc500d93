"""Tokenise and detokenise for the server: prompts, conversations, single tokens.

It owns the tokenizer and the threads it runs in, so that a long prompt does not block the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from longspan.errors import ContextOverflow, QueueFull, RequestError
from longspan.server.errors import cut, shortened

_SHORT = 16 << 10  # bytes: about 20 ms of encoding
_MAX_LONG = 64  # longer texts that may wait for their thread, and grammars for theirs; more are refused
_LEAST_MAX_BYTES = 64 << 10  # texts up to this are always encoded, so that an error can give the number of tokens
Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]
Result = TypeVar("Result")
_SHOWN = 400  # characters of a template's error message
RESERVED_OPTIONS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "add_generation_prompt", "continue_final_message", "documents", "kwargs",
}  # fmt: skip


def max_text_bytes(tokenizer: Any, max_model_len: int) -> int:
    """The most bytes of UTF-8 that `max_model_len` tokens can stand for, by the longest token of the vocabulary.

    Vocabularies write a byte as one or more characters, so a token's length there is never below its bytes.
    """
    if tokenizer is None:
        return 0
    longest = max((len(token.encode(errors="replace")) for token in tokenizer.get_vocab()), default=1)
    return max(max_model_len * longest, _LEAST_MAX_BYTES)


def last_tokens(tokens: Sequence[int], keep: int | None, begin: Sequence[int] = ()) -> list[int]:
    """The last `keep` tokens, or all of them if None. What all texts `begin` with (BOS) stays, and counts."""
    if keep is None or len(tokens) <= keep:
        return list(tokens)
    stays = len(begin) if len(begin) < keep and list(tokens[: len(begin)]) == list(begin) else 0
    return [*tokens[:stays], *tokens[len(tokens) - keep + stays :]]


class _Lane:
    """A thread of its own for calls that may take long, and a limit on how many wait for it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting = 0

    @contextmanager
    def place(self, what: str, problem: str) -> Iterator[ThreadPoolExecutor]:
        """The thread, for one call. Raises `QueueFull`, which says what there are too many of and their problem."""
        if self._waiting >= _MAX_LONG:
            raise QueueFull(what, self._waiting, problem, "try again in a moment")
        self._waiting += 1
        try:
            yield self._thread
        finally:
            self._waiting -= 1


class Text:
    """The model's tokenizer. Without one, prompts must be token ids and outputs have no text.

    Long texts are encoded one at a time in a thread of their own, so that short ones do not wait for them. The
    tokenizers library releases the GIL meanwhile.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_bytes = max_text_bytes(tokenizer, max_model_len)
        self.max_model_len = max_model_len
        self._short = ThreadPoolExecutor(2, "longspan-tokenizer")
        self._long = _Lane("longspan-tokenizer-long")
        self._grammars = _Lane("longspan-grammars")
        self.num_pending = 0  # calls in the threads or waiting for them
        self.token = lru_cache(1 << 16)(self._token)

    async def run(self, size: int, call: Callable[[], Result]) -> Result:
        """Run `call` in the thread for texts of `size` bytes. Raises `QueueFull` if too many long texts wait."""
        if size <= _SHORT:
            return await self._counted(self._short, call)
        with self._long.place("prompts", f"of more than {_SHORT} bytes wait for the tokenizer already") as thread:
            return await self._counted(thread, call)

    async def run_grammar(self, call: Callable[[], Result]) -> Result:
        """Run `call`, which makes a grammar, in a thread for those. Raises `QueueFull` if too many wait."""
        with self._grammars.place("grammars", "are being made already") as thread:
            return await self._counted(thread, call)

    async def _counted(self, thread: ThreadPoolExecutor, call: Callable[[], Result]) -> Result:
        self.num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, call)
        finally:
            self.num_pending -= 1

    async def encode(
        self, text: str, add_special_tokens: bool = True, field: str = "prompt", keep: int | None = None
    ) -> list[int]:
        """Token ids of a text: all, or those that `last_tokens` keeps. Raises `RequestError`, which names `field`."""
        self._require(field, text)
        text = self._bounded(text, field, keep)
        return await self.run(len(text), lambda: self._encode(text, add_special_tokens, keep))

    async def chat(
        self, conversation: Callable[[], Conversation], options: Mapping[str, Any], size: int,
        add_special_tokens: bool = False, keep: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation under the model's chat template. Raises `RequestError`.

        `conversation` returns messages and tools as the template expects them; it is called in the thread. `size` is
        approximately their size in bytes. `options` are passed to the template. `keep` is as in `encode`.
        """
        tokenizer = self._require("messages", "[...]")
        if not (tokenizer.chat_template or options.get("chat_template")):
            raise RequestError("messages", "[...]", "the model has no chat template", "use /v1/completions")

        def run() -> list[int]:
            messages, tools = conversation()
            try:
                rendered = tokenizer.apply_chat_template(messages, tools=tools or None, **options, tokenize=False)
            except Exception as error:  # templates raise many types for conversations that they do not support
                problem = f"the model's chat template refuses them ({type(error).__name__}: {cut(str(error), _SHOWN)})"
                raise RequestError("messages", shortened(messages), problem, "change the conversation") from error
            return self._encode(self._bounded(rendered, "messages", keep), add_special_tokens, keep)

        return await self.run(size, run)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, including special tokens. Raises `RequestError`."""
        tokenizer = self._require("tokens", tokens)
        if len(tokens) > self.max_model_len:
            raise ContextOverflow(
                "tokens", f"[{len(tokens)} ids]", f"exceed max_model_len={self.max_model_len}", "send fewer at once"
            )
        top = len(tokenizer)
        for token in tokens and (min(tokens), max(tokens)):
            if not 0 <= token < top:
                raise RequestError("tokens", token, f"is not in 0..{top - 1}", "check the tokenizer")
        return await self.run(len(tokens), lambda: str(tokenizer.decode(list(tokens))))

    def _encode(self, text: str, add_special_tokens: bool, keep: int | None) -> list[int]:
        def tokens(of: str) -> list[int]:
            return list(self.tokenizer.encode(of, add_special_tokens=add_special_tokens))

        return last_tokens(tokens(text), keep, tokens("") if keep is not None and add_special_tokens else ())

    def _bounded(self, text: str, field: str, keep: int | None) -> str:
        """The text, or the end of it that all tokens to keep are in. Raises `ContextOverflow` if it cannot fit."""
        if keep is not None:
            return text[-self.max_bytes :]
        self._check_length(text, field)
        return text

    def _check_length(self, text: str, field: str) -> None:
        """Raise `ContextOverflow` for a text that cannot fit the context, before it is encoded."""
        if 4 * len(text) <= self.max_bytes:  # a character has at most four bytes in UTF-8
            return
        # a text of more characters is not copied to count its bytes
        size = len(text) if len(text) > self.max_bytes else len(text.encode(errors="replace"))
        if size > self.max_bytes:
            raise ContextOverflow(
                field, f"[at least {size} bytes]",
                f"cannot fit max_model_len={self.max_model_len} tokens, which this model's vocabulary makes of at"
                f" most {self.max_bytes} bytes",
                "shorten it or raise --max-model-len",
            )  # fmt: skip

    def _token(self, token_id: int) -> str:
        """The text of one token alone. Parts of characters become replacement characters."""
        if self.tokenizer is None:
            return f"token_id:{token_id}"
        return str(self.tokenizer.decode([token_id]))

    def _require(self, field: str, value: object) -> Any:
        if self.tokenizer is None:
            raise RequestError(field, shortened(value), "is text and the model has no tokenizer", "give token ids")
        return self.tokenizer
