"""Errors in OpenAI's format, `{"error": {message, type, param, code}}`, with their HTTP status.

It owns the mapping from exceptions; it must not know which endpoint failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

from longspan.errors import ContextOverflow, EngineError, LongspanError, QueueFull, RequestError, RequestTimeout

_SHOWN = 80  # characters of a value in a message
_KINDS = {"missing": "is missing", "extra_forbidden": "unknown parameter"}  # what the log says of pydantic's types
# vLLM's fields for the form of an answer
_GUIDED = ("structured_outputs", "guided_json", "guided_choice", "guided_regex", "guided_grammar")
_SCHEMA_INSTEAD = "give a JSON schema in response_format in its place"
_BRIEF = Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = _SHOWN


class HttpError(RequestError):
    """A request that is refused with an HTTP status and OpenAI's error `code`."""

    def __init__(self, status: int, code: str, param: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(param, value, problem, remedy)
        self.status, self.code = status, code


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors of a block name the fields that the client has sent; `names` has them by the engine's names."""
    try:
        yield
    except RequestError as error:
        name = names.get(error.field, error.field)
        if name == error.field or isinstance(error, HttpError):
            raise
        limit_not_given = error.field == "max_tokens" and name == names.get(
            "prompt"
        )  # its default is no value of `name`
        value = "" if limit_not_given else error.value
        raise type(error)(name, value, error.problem, error.remedy) from error


@dataclass(frozen=True)
class Problem:
    """An error as it is sent to the client."""

    # HTTP status
    status: int
    # text for people
    message: str
    # OpenAI's class of errors
    type: str = "invalid_request_error"
    # the field of the body that is wrong, if one is
    param: str | None = None
    # OpenAI's code of the error
    code: str | None = None
    # HTTP headers to send with it
    headers: Mapping[str, str] = field(default_factory=dict)
    # what the server's log says of it: nothing that the client has sent; '' is the code
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", _without_values(self.reason or self.code or self.type))

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def problem_of(error: Exception) -> Problem:
    """The answer to an exception. The message of an exception that is not a `LongspanError` is not shown."""
    match error:
        case HttpError():
            kind = "authentication_error" if error.status == 401 else "invalid_request_error"
            return Problem(error.status, str(error), kind, error.field, error.code, reason=_reason(error))
        case QueueFull():
            headers = {"Retry-After": "1"}
            return Problem(429, str(error), "rate_limit_error", None, "queue_full", headers, _reason(error))
        case RequestTimeout():
            return Problem(408, str(error), "timeout_error", None, "request_timeout", reason=_reason(error))
        case ContextOverflow():
            code = "context_length_exceeded"
            return Problem(400, str(error), param=error.field, code=code, reason=_reason(error))
        case RequestError():
            return Problem(400, str(error), param=error.field, code="invalid_value", reason=_reason(error))
        case EngineError():
            headers = {"Retry-After": "5"}
            return Problem(503, str(error), "server_error", None, "engine_unavailable", headers, str(error))
        case LongspanError():
            return Problem(400, str(error))
    kind = type(error).__name__
    return Problem(500, f"internal error ({kind}); see the server's log", "server_error", None, "bug", reason=kind)


def problem_of_validation(errors: Sequence[Mapping[str, Any]], body: object, known: Sequence[str]) -> Problem:
    """The answer to pydantic's `errors` in a `body`, of which the first is shown; `known` are the body's fields."""
    first = errors[0]
    path = _path(first, body)
    param = ".".join(path) or "body"
    kind, value = first["type"], shortened(first.get("input"))
    # pydantic's text may quote the value, its type does not
    reason = f"{_named(param)}: {_KINDS.get(kind, f'is refused: {kind}')}"
    if kind == "missing":
        return Problem(400, f"{param}: is missing; give it", param=param, code="missing_parameter", reason=reason)
    if kind == "extra_forbidden":
        near = get_close_matches(path[-1], known, 1)
        remedy = f"did you mean {near[0]}? otherwise leave it out" if near else "leave it out"
        remedy = _SCHEMA_INSTEAD if path[-1] in _GUIDED else remedy
        message = f"{param}={value}: unknown parameter; {remedy}"
        return Problem(400, message, param=param, code="unknown_parameter", reason=reason)
    problem = " or ".join(dict.fromkeys(_lowered(error["msg"]) for error in errors if _path(error, body) == path))
    return Problem(400, f"{param}={value}: {problem}; change it", param=param, code="invalid_type", reason=reason)


def _reason(error: RequestError) -> str:
    return f"{_named(error.field)}: {error.problem}"


def _named(field_name: str) -> str:
    """The outermost field; names below it may be the client's own, and a name that is none is not shown."""
    outermost = field_name.partition(".")[0]
    return outermost if len(outermost) <= _SHOWN and outermost.replace("-", "_").isidentifier() else "body"


def _without_values(problem: str) -> str:
    """A problem without what stands in parentheses, where libraries tell details of what they were given."""
    return cut(problem.partition(" (")[0])


def _path(error: Mapping[str, Any], body: object) -> list[str]:
    """The path to the wrong field: pydantic's location without the names of types that were tried."""
    path: list[str] = []
    for part in error["loc"][1:]:
        if isinstance(body, dict) and (part in body or error["type"] == "missing"):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            continue
        path.append(cut(str(part)))
    return path


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def shortened(value: object) -> str:
    """The representation of a value, cut to a length that a message can hold."""
    return cut(_BRIEF.repr(value))


def cut(text: str, most: int = _SHOWN) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
