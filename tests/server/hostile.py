"""Requests nobody should send: a kept corpus, mutations of valid bodies, and HTTP of every shape; and what is a fault.

An answer is a fault if it is a 5xx, if its error has not the usual shape, or if there is none.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.server.chat import ChatBody
from longspan.server.completions import CompletionBody
from longspan.server.tokens import DetokenizeBody, TokenizeBody

CORPUS = Path(__file__).parent / "corpus"
BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 5, 1000, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, 0.5, 1.0, -0.5, 1e-300, 1e300,
    "", "a", "tiny", "\x00", "é😀", "a" * 600, "auto", "required", "none", "json_object", "json_schema", "<eos>",
    [], [1], [96], [97], [-1], ["a"], ["", "b"], [[1], [2]], [[]], [None], {}, {"a": 1}, {"5": 1.0}, {"type": "text"},
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}}}},
    {"include_usage": True}, [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"role": "assistant"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "tool", "content": 5}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    {"type": "function", "function": {"name": "f"}}, {"tokenize": False}, {"return_dict": True}, {"messages": []},
    {"-1": 1}, {"97": -100}, {"5": 1e308}, ["\ud800"], "\udfff", "\u202e\u0000\uffff", [["a"]], [[-1]], [[2**70]],
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"continuous_usage_stats": True},
    {"type": "json_schema", "json_schema": {"schema": {"type": "array", "minItems": 10**9}}},
    {"type": "json_schema", "json_schema": {"schema": False}}, [{"type": "function"}], [{"role": "system", "a": [{}]}],
]  # fmt: skip
_SPLICES = (b"NaN", b"-Infinity", b"1e999", b"{", b"]", b'"', b"\\", b"\x00", b"\xff", b"\xed\xa0\x80", b"0" * 400)
_STATUSES = (200, 400, 404, 405, 408, 413, 415, 429, 431, 499)  # of complete requests; 499: their client has left
_ERROR = {"message", "type", "param", "code"}


@dataclass(frozen=True)
class Hostile:
    """One request."""

    # the path, as it is sent
    path: str
    # the body
    body: bytes = b""
    # the method
    method: str = "POST"
    # headers beyond content type and length
    headers: tuple[tuple[str, str], ...] = ()
    # bytes of the answer after which the client leaves; None: it reads all
    leaves_after: int | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path} {dict(self.headers)} {self.body[:4000]!r}, leaves after {self.leaves_after}"


def corpus() -> list[tuple[str, Hostile]]:
    """(what it is, request) of all files.

    A file is a list of objects with `what`, `path` and either `body`, any JSON, or `text`: a list of strings, and of
    [string, times] for those that repeat. A character U+DC80 to U+DCFF stands for the byte 0x80 to 0xFF.
    """
    found = []
    for file in sorted(CORPUS.glob("*.json")):
        for entry in json.loads(file.read_text()):
            found.append((f"{file.stem}: {entry['what']}", Hostile(entry["path"], _bytes(entry))))
    return found


def _bytes(entry: dict[str, Any]) -> bytes:
    if "body" in entry:
        return json.dumps(entry["body"]).encode()
    parts = ((part, 1) if isinstance(part, str) else part for part in entry["text"])
    return "".join(part * times for part, times in parts).encode(errors="surrogateescape")


def body_of(source: random.Random, fields: list[str]) -> dict[str, Any]:
    """Valid at heart, with some fields replaced by whatever there is."""
    body: dict[str, Any] = {"max_tokens": source.choice([1, 3, 8])}
    body["prompt"], body["messages"], body["tokens"] = "abc", [{"role": "user", "content": "hi"}], [1, 2]
    body = {name: value for name, value in body.items() if name in fields}
    for name in source.sample(fields, min(len(fields), source.randint(0, 4))):
        body[name] = source.choice(VALUES)
    return body


def mutated(source: random.Random) -> Hostile:
    """A valid body with other values in some fields, sometimes damaged as text, from a client that sometimes leaves."""
    path = source.choice([*BODIES, "/v1/completions", "/v1/chat/completions"])
    body = body_of(source, list(BODIES[path].model_fields))
    if path.startswith("/v1") and source.random() < 0.4:
        body |= {"stream": True, "max_tokens": source.choice([1, 5, 60])}
    if source.random() < 0.1:  # a wrong value further inside
        body["messages" if path != "/v1/completions" else "prompt"] = [source.choice(VALUES) for _ in range(3)]
    raw = json.dumps(body).encode()
    if source.random() < 0.1:
        cut = source.randrange(len(raw))
        raw = raw[:cut] + source.choice(_SPLICES) + raw[cut + source.choice([0, 0, 1, 5]) :]
    return Hostile(path, raw, leaves_after=source.choice([0, 1, 300, 2000]) if source.random() < 0.15 else None)


def fault_of(status: int, kind: str, body: bytes, complete: bool = True) -> str | None:
    """Why an answer is a fault; None if it is none. `kind` is its content type; `complete`: all of it was read."""
    if status not in _STATUSES:
        return f"status {status}: {body[:300]!r}"
    if not complete:
        return None
    if status == 499:
        return None
    if status != 200:
        return error_fault(body)
    if kind.startswith("text/event-stream"):
        return _stream_fault(body)
    if kind.startswith("application/json"):
        with suppress(ValueError):
            json.loads(body)
            return None
        return f"the answer is no JSON: {body[:300]!r}"
    return None


def error_fault(body: bytes) -> str | None:
    """Why an error's body is not as usual."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"the error has no usual shape: {body[:300]!r}"
    texts = [error.get("message"), error.get("type"), error.get("param") or "", error.get("code") or ""]
    return None if set(error) == _ERROR and all(isinstance(text, str) for text in texts) else f"the error is {error}"


def _stream_fault(body: bytes) -> str | None:
    if not body.endswith(b"data: [DONE]\n\n"):
        return f"the stream has no end: {body[-300:]!r}"
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if event.get("error", {}).get("type") == "server_error":
                return f"the stream says {event}"
    return None


@dataclass(frozen=True)
class Shape:
    """Bytes on a connection."""

    # what is unusual about them
    what: str
    # the bytes
    sent: bytes
    # answers that must come; 0: the request is not complete or not HTTP, and the connection may be closed or stay open
    answers: int = 1
    # the first request's method, which says whether its answer has a body
    method: str = "GET"


def _post(headers: str, body: bytes, path: str = "/v1/completions", version: str = "1.1") -> bytes:
    return f"POST {path} HTTP/{version}\r\n{headers}\r\n".encode("latin-1") + body


_BODY = json.dumps({"prompt": "abc", "max_tokens": 2, "temperature": 0}).encode()
_JSON = "Host: x\r\nContent-Type: application/json\r\n"
_SIZED = f"{_JSON}Content-Length: {len(_BODY)}\r\n"
_CHUNKED = f"{_JSON}Transfer-Encoding: chunked\r\n"
_CHUNKS = b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY) + b"0\r\n\r\n"
_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def _get(target: str, headers: str = "Host: x\r\n", method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return f"{method} {target} {version}\r\n{headers}\r\n".encode("latin-1")


SHAPES = (
    Shape("chunks of one byte", _post(_CHUNKED, _CHUNKS)),
    Shape("chunks with extensions and trailers",
          _post(_CHUNKED, b"%x;a=b\r\n%s\r\n0\r\nx: y\r\n\r\n" % (len(_BODY), _BODY))),
    Shape("a chunk size that is no number", _post(_CHUNKED, b"zz\r\nabc\r\n0\r\n\r\n"), 0),
    Shape("a negative chunk size", _post(_CHUNKED, b"-1\r\nabc\r\n0\r\n\r\n"), 0),
    Shape("a chunk of 2^64 bytes", _post(_CHUNKED, b"ffffffffffffffff1\r\nabc"), 0),
    Shape("chunks that end early", _post(_CHUNKED, b"5\r\nabc"), 0),
    Shape("length and chunks", _post(_SIZED + "Transfer-Encoding: chunked\r\n", _CHUNKS), 0),
    Shape("another transfer encoding", _post(f"{_JSON}Transfer-Encoding: gzip, chunked\r\n", _CHUNKS), 0),
    Shape("a length too small", _post(f"{_JSON}Content-Length: 5\r\n", _BODY)),
    Shape("a length too large", _post(f"{_JSON}Content-Length: 5000\r\n", _BODY), 0),
    Shape("a length of 10^30", _post(f"{_JSON}Content-Length: 1{'0' * 30}\r\n", _BODY), 0),
    Shape("a length over the limit", _post(f"{_JSON}Content-Length: 99999999999\r\n", b"")),
    Shape("a negative length", _post(f"{_JSON}Content-Length: -1\r\n", _BODY), 0),
    Shape("a length that is no number", _post(f"{_JSON}Content-Length: ten\r\n", _BODY), 0),
    Shape("two lengths", _post(f"{_SIZED}Content-Length: 3\r\n", _BODY), 0),
    Shape("no length", _post(_JSON, b"")),
    Shape("no content type", _post(f"Host: x\r\nContent-Length: {len(_BODY)}\r\n", _BODY)),
    Shape("a form", _post(_SIZED.replace("application/json", "multipart/form-data; boundary=x"), _BODY)),
    Shape("another charset", _post(_SIZED.replace("json", "json; charset=utf-16"), _BODY)),
    Shape("gzip", _post(f"{_JSON}Content-Encoding: gzip\r\nContent-Length: {len(gzip.compress(_BODY, mtime=0))}\r\n",
                        gzip.compress(_BODY, mtime=0))),
    Shape("Expect: 100-continue", _post(f"{_SIZED}Expect: 100-continue\r\n", _BODY)),
    Shape("Expect: what nobody knows", _post(f"{_SIZED}Expect: 200-ok\r\n", _BODY)),
    Shape("two completions at once", _post(_SIZED, _BODY) * 2, 2),
    Shape("sixteen probes at once", (_HEALTH + b"\r\n") * 16, 16),
    Shape("a completion, then what is no HTTP", _post(_SIZED, _BODY) + b"\x00\x01\x02\r\n\r\n"),
    Shape("a completion, then one whose chunks are none", _post(_SIZED, _BODY) + _post(_CHUNKED, b"zz\r\n")),
    Shape("a completion, then half a head", _post(_SIZED, _BODY) + b"GET /hea"),
    Shape("HTTP/1.0", _post(_SIZED, _BODY, version="1.0")),
    Shape("HTTP/1.0 without a host", _get("/health", "", version="HTTP/1.0")),
    Shape("HTTP/1.1 without a host", _get("/health", "")),
    Shape("HTTP/0.9", b"GET /health\r\n\r\n", 0),
    Shape("HTTP/9.9", _get("/health", version="HTTP/9.9"), 0),
    Shape("HTTP/2's beginning", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0),
    Shape("TLS's beginning", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 0),
    Shape("an empty host", _get("/health", "Host:\r\n")),
    Shape("a host of 8,000 bytes", _get("/health", f"Host: {'a' * 8000}\r\n")),
    Shape("a host of strange characters", _get("/health", "Host: a b/c?d#e@[::1]:99999\xe9\r\n")),
    Shape("two hosts", _get("/health", "Host: a\r\nHost: b\r\n")),
    Shape("an absolute address", _get("http://elsewhere.example/health")),
    Shape("an absolute address that is none", _get("http://[::1/health"), 0),
    Shape("a target that is a star", _get("*", method="OPTIONS"), 0, "OPTIONS"),
    Shape("a path of two slashes", _get("//health")),
    Shape("a path that leaves", _get("/../../etc/passwd")),
    Shape("a path that leaves, escaped", _get("/..%2f..%2fetc%2fpasswd")),
    Shape("a null byte in the path", _get("/v1/models/%00")),
    Shape("bytes in the path that are no UTF-8", _get("/v1/models/%ff%fe")),
    Shape("a path of raw bytes", _get("/v1/models/\xff\xfe"), 0),
    Shape("half an escape in the path", _get("/v1/models/%4")),
    Shape("a long path", _get("/v1/models/" + "a" * 30_000)),
    Shape("a path beyond the limit", _get("/" + "a" * 70_000), 0),
    Shape("a query", _get("/health?a=b&a[]=%00&" + "x" * 2000)),
    Shape("a fragment", _get("/health#a")),
    *(Shape(f"the method {method}", _get("/health", method=method), method=method)
      for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")),
    *(Shape(f"the method {method} for completions", _get("/v1/completions", method=method), method=method)
      for method in ("GET", "HEAD", "OPTIONS", "PUT")),
    Shape("the method CONNECT", _get("x:443", method="CONNECT"), 0, "CONNECT"),
    Shape("a method nobody knows", _get("/health", method="BREW"), 0),
    Shape("a method in small letters", _get("/health", method="get"), 0),
    Shape("an upgrade to WebSocket", _HEALTH + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"
          b"\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"),
    Shape("an upgrade to HTTP/2", _HEALTH + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
          b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"),
    Shape("a header that goes on in the next line", _HEALTH + b"x: a\r\n b\r\n\r\n", 0),
    Shape("a header without a colon", _HEALTH + b"nothing\r\n\r\n", 0),
    Shape("a header without a name", _HEALTH + b": a\r\n\r\n", 0),
    Shape("a space before the colon", _HEALTH + b"x : a\r\n\r\n", 0),
    Shape("a null byte in a header", _HEALTH + b"x: a\x00b\r\n\r\n", 0),
    Shape("bytes in a header that are no ASCII", _HEALTH + b"x: \xff\xfe\r\nAuthorization: Bearer \xe9\r\n\r\n"),
    Shape("500 headers", _HEALTH + b"".join(b"x-%d: y\r\n" % number for number in range(500)) + b"\r\n"),
    Shape("line feeds alone", _HEALTH.replace(b"\r", b"") + b"\n", 0),
    Shape("empty lines first", b"\r\n\r\n" + _HEALTH + b"\r\n", 0),
    Shape("nothing but line feeds", b"\r\n" * 500, 0),
    Shape("a range", _HEALTH + b"Range: bytes=0-0\r\n\r\n"),
    Shape("cookies", _HEALTH + b"Cookie: " + b"a=b; " * 2000 + b"\r\n\r\n"),
    Shape("a body with GET", _get("/health", "Host: x\r\nContent-Length: 3\r\n") + b"abc"),
)  # fmt: skip


def exchange(port: int, shape: Shape, seconds: float = 30.0, patience: float = 1.0) -> str | None:
    """Send a shape to the server; why what came back is a fault, or None.

    Where no answer must come, the client leaves after `patience` seconds without one.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as opened:
        with suppress(OSError):
            opened.sendall(shape.sent)
        if not shape.answers:
            opened.settimeout(patience)
        found = list(_answers(opened, shape))
        for status, kind, body in found:
            empty = shape.method == "HEAD" or status == 101
            fault = fault_of(status, kind, body, complete=not empty)
            if fault:
                return fault
    return f"{len(found)} answers instead of {shape.answers}" if len(found) < shape.answers else None


def _answers(opened: socket.socket, shape: Shape) -> Iterator[tuple[int, str, bytes]]:
    reader = opened.makefile("rb")
    for _ in range(shape.answers or 1):
        answer = http.client.HTTPResponse(_Reading(reader), method=shape.method)  # type: ignore[arg-type]
        try:
            answer.begin()
            yield answer.status, answer.headers.get("content-type", ""), answer.read()
        except (OSError, http.client.HTTPException):
            return


class _Reading:
    """A socket for `http.client`, whose answers on one connection share one buffer."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def makefile(self, mode: str) -> Any:
        return _Unclosed(self._reader)


class _Unclosed:
    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def close(self) -> None:
        """Others read on."""
