"""Parse and validate request bodies in bounded time.

It owns the bounds on the structure of JSON and the thread for large bodies; it must not know what the fields mean.

Decoding and validation are each one C call that holds the GIL, in a thread too. Therefore values and brackets are
counted first: a body within the bounds is decoded and validated in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from longspan.errors import RequestError
from longspan.server.fields import Body

_LOG = logging.getLogger("longspan.server")
INLINE_BYTES = 32 << 10  # parsing fewer bytes takes less time than switching to a thread
_BLOCK_BYTES = 256 << 10  # split at once: each piece is an object of some forty bytes
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP_OF = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True)
class JsonBounds:
    """How much JSON one body may hold. A body at the default bounds takes about 0.2 s to decode and validate."""

    values: int = 1 << 20  # elements of lists and fields of objects, together
    containers: int = 1 << 18  # lists and objects; a chat of 65,536 messages in parts has 196,608
    names: int = 1 << 18  # names of fields; Python hashes and keeps each new one
    depth: int = 128  # nesting; JSON schemas that grammars support have a tenth of it

    @staticmethod
    def of_model(max_model_len: int) -> JsonBounds:
        """Bounds with room for a prompt of `max_model_len` token ids besides all other fields."""
        return JsonBounds(values=max(JsonBounds.values, max_model_len + (1 << 16)))

    def check(self, texts: Sequence[bytes], field: str = "body") -> None:
        """Raise `RequestError` if the texts together exceed the bounds.

        Text that is not JSON may pass; decoding fails at its first error.
        """
        if sum(raw.count(b",") + raw.count(b"[") + raw.count(b"{") for raw in texts) <= self.depth:
            return  # true of most bodies: with so few commas and brackets no bound can be exceeded
        commas = containers = names = depth = 0
        for raw in texts:
            bare = _without_strings(raw, self.values, field)
            brackets = bare.translate(None, _NO_BRACKETS)
            opened = brackets.count(b"[") + brackets.count(b"{")
            commas, containers, names = commas + bare.count(b","), containers + opened, names + bare.count(b":")
            if opened > self.depth and containers <= self.containers:
                depth = max(depth, max(accumulate(map(_STEP_OF.__getitem__, brackets))))
        _require(commas + containers, self.values, field, "values")
        _require(containers, self.containers, field, "lists and objects")
        _require(names, self.names, field, "named fields")
        _require(depth, self.depth, field, "levels of lists and objects")


def _without_strings(raw: bytes, most: int, field: str) -> bytes:
    """JSON without the contents of its strings. In valid JSON a backslash occurs in strings only."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    _require(plain.count(b'"') // 2, 2 * most, field, "texts and names")
    bare: list[bytes] = []
    inside = 0  # 1 if a block begins within a string
    for begin in range(0, len(plain), _BLOCK_BYTES):
        pieces = plain[begin : begin + _BLOCK_BYTES].split(b'"')
        bare.append(b"".join(pieces[inside::2]))
        inside ^= (len(pieces) - 1) & 1
    return b"".join(bare)


def _require(found: int, most: int, field: str, kind: str) -> None:
    if found > most:
        raise RequestError(field, f"[{found} {kind}]", f"holds more than {most} {kind}", "send less at once")


async def received(request: Request) -> bytes:
    """The body of a request. Raises `ClientDisconnect`.

    Unlike with `Request.body` there are never two copies of it, and the request does not keep it.
    """
    body = io.BytesIO()
    async for part in request.stream():
        body.write(part)
    return body.getvalue()


def decoded_bytes(raw: bytes) -> int:
    """The most bytes that the text of a body takes in Python: one wide character makes each of its text take four."""
    return len(raw) if raw.isascii() and b"\\u" not in raw else 4 * len(raw)


class BodyReader:
    """Decodes and validates bodies: small ones at once, larger ones one at a time in a thread."""

    def __init__(self, bounds: JsonBounds) -> None:
        self._bounds = bounds
        self._warned: set[str] = set()  # fields that change nothing, once they were sent
        self._thread = ThreadPoolExecutor(1, "longspan-bodies")

    async def parse(self, raw: bytes, kind: type[AnyBody]) -> AnyBody:
        """The body as an instance of `kind`. Raises `RequestError`, `HTTPException` or `RequestValidationError`."""
        if len(raw) <= INLINE_BYTES:
            return self._parse(raw, kind)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._parse, raw, kind)

    def _parse(self, raw: bytes, kind: type[AnyBody]) -> AnyBody:
        self._bounds.check([raw])
        try:
            values: Any = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HTTPException(400, f"body: is no valid JSON ({error}); send one JSON object in UTF-8") from error
        if isinstance(values, dict):
            self._drop_unused(values, kind)
        try:
            return kind.of(values, len(raw))
        except ValidationError as error:
            errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
            raise RequestValidationError(errors, body=values) from None

    def _drop_unused(self, values: dict[str, Any], kind: type[Body]) -> None:
        """Remove fields that are taken and change nothing. The log says so once for each name."""
        for name in kind.unused.keys() & values.keys():
            del values[name]
            if name not in self._warned:
                self._warned.add(name)
                _LOG.warning("requests give %s, which changes nothing here: %s", name, kind.unused[name])
