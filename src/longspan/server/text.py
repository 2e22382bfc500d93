"""Text to tokens and back for the server: prompts, conversations, single tokens.

It owns the tokenizer and the threads it encodes in, so that a long prompt never holds up the event loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from longspan.errors import RequestError
from longspan.server.errors import shortened

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "add_generation_prompt", "continue_final_message", "documents", "kwargs",
}  # fmt: skip


class Text:
    """The model's tokenizer, or its absence: then prompts are token ids and outputs have no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(2, "longspan-tokenizer")
        self.token = lru_cache(1 << 16)(self._token)

    async def encode(self, text: str, add_special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of a text. Raises `RequestError`."""
        tokenizer = self._require(field, text)

        def run() -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of a conversation under the model's template, ready for the answer. Raises `RequestError`."""
        tokenizer = self._require("messages", messages)
        for name in options:
            if name in _RESERVED:
                raise RequestError(f"chat_template_kwargs.{name}", "...", "is not the template's own", "leave it out")
        if not tokenizer.chat_template:
            raise RequestError("messages", shortened(messages), "the model has no chat template", "use /v1/completions")

        def run() -> list[int]:
            rendered = tokenizer.apply_chat_template(
                list(messages),
                **{"tools": list(tools) if tools else None, "add_generation_prompt": True, **options},
                return_dict=False,
            )
            return list(rendered)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except Exception as error:  # a template may raise anything about a conversation it was not made for
            problem = f"the model's chat template refuses them ({type(error).__name__}: {error})"
            raise RequestError("messages", shortened(messages), problem, "change the conversation") from error

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included. Raises `RequestError`."""
        tokenizer = self._require("tokens", tokens)
        top = len(tokenizer)
        for token in tokens:
            if not 0 <= token < top:
                raise RequestError("tokens", token, f"is not in 0..{top - 1}", "check the tokenizer")

        def run() -> str:
            return str(tokenizer.decode(list(tokens)))

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _token(self, token_id: int) -> str:
        """One token's text by itself; halves of characters show as replacement characters."""
        if self.tokenizer is None:
            return f"token_id:{token_id}"
        return str(self.tokenizer.decode([token_id]))

    def _require(self, field: str, value: object) -> Any:
        if self.tokenizer is None:
            raise RequestError(field, shortened(value), "is text and the model has no tokenizer", "give token ids")
        return self.tokenizer
