"""`/tokenize` and `/detokenize`, in vLLM's format.

It owns the formats of both bodies; `text.py` has the tokenizer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import Field

from longspan.errors import RequestError
from longspan.server.conversation import Messages, TemplateFields, conversation
from longspan.server.fields import Body, Ids
from longspan.server.served import ServedModel
from longspan.server.text import Text
from longspan.server.tool_choice import Tools


class TokenizeBody(TemplateFields):
    """A text, or a conversation under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="begin with BOS; default: for a text, and not for a conversation"
    )

    async def answer(self, text: Text, served: ServedModel) -> dict[str, Any]:
        """Token ids, their number, and the model's limit. Raises `RequestError`."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", repr(self.prompt), "and messages exclude each other", "give one of the two")
        if self.messages is not None:
            options = self.template_options(served.trusts_templates)
            talk = partial(conversation, self.messages, self.tools)
            tokens = await text.chat(talk, options, self.num_bytes, bool(self.add_special_tokens))
        else:
            tokens = await text.encode(self.prompt or "", self.add_special_tokens is not False)
        return {"count": len(tokens), "max_model_len": text.max_model_len, "tokens": tokens}


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: Ids
