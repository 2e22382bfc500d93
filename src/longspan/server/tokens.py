"""`/tokenize` and `/detokenize`, in vLLM's format.

It owns the formats of both bodies; `text.py` has the tokenizer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from longspan.errors import RequestError
from longspan.server.chat import Messages, TemplateOptions, Tools, conversation
from longspan.server.fields import Body, Ids
from longspan.server.text import Text


class TokenizeBody(Body):
    """A text, or a conversation under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateOptions | None = None

    async def answer(self, text: Text, max_model_len: int) -> dict[str, Any]:
        """Token ids, their number, and the model's limit. Raises `RequestError`."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", repr(self.prompt), "and messages exclude each other", "give one of the two")
        if self.messages is not None:
            options = {"add_generation_prompt": self.add_generation_prompt, **(self.chat_template_kwargs or {})}
            tokens = await text.chat(partial(conversation, self.messages, self.tools), options, self.num_bytes)
        else:
            tokens = await text.encode(self.prompt or "", self.add_special_tokens)
        return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens}


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: Ids
