"""Parse a streamed answer: bytes into server-sent events, events into tokens and usage.

It owns the wire format of OpenAI-compatible streams; it must not know how the bytes arrive or what is measured.
"""

from __future__ import annotations

from typing import Any

import msgspec


class EventSplitter:
    """Splits a stream of bytes into the data of complete events. Comments and other fields are dropped.

    The bytes may be divided anywhere, also inside a character. Lines end in LF or CR LF.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; returns the data of the events that they complete."""
        events = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class _Delta(msgspec.Struct):
    # set in the first chunk of a message
    role: str | None = None
    # text of the answer
    content: str | None = None
    # text of the reasoning, by vLLM's and DeepSeek's name
    reasoning_content: str | None = None
    # text of the reasoning, by another name
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    # text of a completion
    text: str | None = None
    # message of a chat
    delta: _Delta | None = None
    # set in the last chunk
    finish_reason: str | None = None

    def brings_token(self, first: bool) -> bool:
        """Whether the chunk stands for a token; `first` says that no chunk before it did.

        A chunk with text does. A chunk without text may hold a token whose text is held back, unless it only opens or
        only ends the message.
        """
        delta = self.delta
        if self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)):
            return True
        if self.finish_reason is not None:
            return first  # an answer that ends at once has no other chunk that could be timed
        return not (delta and delta.role)


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    # one, or none in the chunk with usage
    choices: list[_Choice] = []
    # set in one chunk, usually the last
    usage: _Usage | None = None
    # OpenAI's error object, or a text
    error: Any = None
    # "error" in vLLM's older format of errors
    object: str | None = None
    # the error's message in that format
    message: str | None = None


_DECODER = msgspec.json.Decoder(_Chunk)


class StreamedReply:
    """One streamed answer as it arrives. Token counts are None until the server sends usage."""

    def __init__(self) -> None:
        self.chunk_times: list[float] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.error: str | None = None
        self.done = False
        self._splitter = EventSplitter()

    def feed(self, data: bytes, now: float) -> None:
        """Add bytes read at `now`. Raises `msgspec.MsgspecError` or `UnicodeDecodeError` for an invalid event."""
        for event in self._splitter.feed(data):
            if event == b"[DONE]":
                self.done = True
            else:
                self._take(_DECODER.decode(event), now)

    def close(self) -> None:
        """End the stream. A final `[DONE]` counts even without the empty line after it."""
        self.done = self.done or b"[DONE]" in self._splitter.feed(b"\n\n")

    def _take(self, chunk: _Chunk, now: float) -> None:
        if chunk.error is not None or chunk.object == "error":
            self.error = _message(chunk) or "no reason given"
        if chunk.usage is not None:
            self.prompt_tokens, self.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].brings_token(first=not self.chunk_times):
            self.chunk_times.append(now)


def error_message(body: bytes) -> str:
    """The message in the body of an error, or the whole body if its format is not known."""
    text = body.decode(errors="replace")
    try:
        return _message(_DECODER.decode(text)) or text
    except msgspec.MsgspecError:
        return text


def _message(chunk: _Chunk) -> str:
    error = chunk.error
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or chunk.message or error or "")
