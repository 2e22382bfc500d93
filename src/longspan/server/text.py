"""Text to tokens and back for the server: prompts, conversations, single tokens.

It owns the tokenizer and the threads it encodes in, so that a long prompt never holds up the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from longspan.errors import ContextOverflow, QueueFull, RequestError
from longspan.server.errors import cut, shortened

_SHORT = 16 << 10  # bytes: about 20 ms of encoding
_MAX_LONG = 64  # texts beyond that wait for the thread; more are refused
_LEAST_MAX_BYTES = 64 << 10  # cheap enough to encode for any model, so that an error can count tokens
Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]
Result = TypeVar("Result")
_SHOWN = 400  # characters of a template's own complaint
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "add_generation_prompt", "continue_final_message", "documents", "kwargs",
}  # fmt: skip


def max_text_bytes(tokenizer: Any, max_model_len: int) -> int:
    """The most bytes of UTF-8 that so many tokens can stand for: each is at most as long as the vocabulary's longest.

    Vocabularies write a byte with one character or more, so that the length of what they hold is never too short.
    """
    if tokenizer is None:
        return 0
    longest = max((len(token.encode(errors="replace")) for token in tokenizer.get_vocab()), default=1)
    return max(max_model_len * longest, _LEAST_MAX_BYTES)


class Text:
    """The model's tokenizer, or its absence: then prompts are token ids and outputs have no text.

    Long texts have a thread of their own, in which they are encoded one after another: short ones do not wait for
    them. The tokenizer's library lets other threads run meanwhile.
    """

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_bytes = max_text_bytes(tokenizer, max_model_len)
        self._max_model_len = max_model_len
        self._short = ThreadPoolExecutor(2, "longspan-tokenizer")
        self._long = ThreadPoolExecutor(1, "longspan-tokenizer-long")
        self.num_pending = self._num_long = 0  # calls that wait for the tokenizer, or that it works on
        self.token = lru_cache(1 << 16)(self._token)

    async def run(self, size: int, call: Callable[[], Result]) -> Result:
        """Run a call on a text of about that size in the thread for such texts. Raises `QueueFull`."""
        is_long = size > _SHORT
        if is_long and self._num_long >= _MAX_LONG:
            raise QueueFull(
                "prompts", self._num_long, f"of more than {_SHORT} bytes wait for the tokenizer already",
                "try again in a moment",
            )  # fmt: skip
        self.num_pending += 1
        self._num_long += is_long
        try:
            return await asyncio.get_running_loop().run_in_executor(self._long if is_long else self._short, call)
        finally:
            self.num_pending -= 1
            self._num_long -= is_long

    async def encode(self, text: str, add_special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text. Raises `RequestError`."""
        self._require(field, text)
        self._check_length(text, field)
        return await self.run(len(text), lambda: self._encode(text, add_special_tokens))

    async def chat(self, conversation: Callable[[], Conversation], options: Mapping[str, Any], size: int) -> list[int]:
        """Token ids of a conversation under the model's template, ready for the answer. Raises `RequestError`.

        `conversation` makes the messages and the tools as the template wants them; `size` is about their bytes.
        """
        tokenizer = self._require("messages", "[...]")
        for name in options:
            if name in _RESERVED:
                raise RequestError(f"chat_template_kwargs.{name}", "...", "is not the template's own", "leave it out")
        if not tokenizer.chat_template:
            raise RequestError("messages", "[...]", "the model has no chat template", "use /v1/completions")

        def run() -> list[int]:
            messages, tools = conversation()
            try:
                rendered = tokenizer.apply_chat_template(
                    messages, **{"tools": tools or None, "add_generation_prompt": True, **options}, tokenize=False
                )
            except Exception as error:  # a template may raise anything about a conversation it was not made for
                problem = f"the model's chat template refuses them ({type(error).__name__}: {cut(str(error), _SHOWN)})"
                raise RequestError("messages", shortened(messages), problem, "change the conversation") from error
            self._check_length(rendered, "messages")
            return self._encode(rendered, False)

        return await self.run(size, run)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included. Raises `RequestError`."""
        tokenizer = self._require("tokens", tokens)
        if len(tokens) > self._max_model_len:
            raise ContextOverflow(
                "tokens", f"[{len(tokens)} ids]", f"exceed max_model_len={self._max_model_len}", "send fewer at once"
            )
        top = len(tokenizer)
        for token in tokens and (min(tokens), max(tokens)):
            if not 0 <= token < top:
                raise RequestError("tokens", token, f"is not in 0..{top - 1}", "check the tokenizer")
        return await self.run(len(tokens), lambda: str(tokenizer.decode(list(tokens))))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _check_length(self, text: str, field: str) -> None:
        """Raise `ContextOverflow` for a text that is too long whatever it holds, before it is encoded."""
        if 4 * len(text) <= self.max_bytes:  # UTF-8 has at most four bytes a character
            return
        size = len(text.encode(errors="replace"))
        if size > self.max_bytes:
            raise ContextOverflow(
                field, f"[{size} bytes]",
                f"cannot fit max_model_len={self._max_model_len} tokens, which this model's vocabulary makes of at"
                f" most {self.max_bytes} bytes",
                "shorten it or raise --max-model-len",
            )  # fmt: skip

    def _token(self, token_id: int) -> str:
        """One token's text by itself; halves of characters show as replacement characters."""
        if self.tokenizer is None:
            return f"token_id:{token_id}"
        return str(self.tokenizer.decode([token_id]))

    def _require(self, field: str, value: object) -> Any:
        if self.tokenizer is None:
            raise RequestError(field, shortened(value), "is text and the model has no tokenizer", "give token ids")
        return self.tokenizer
