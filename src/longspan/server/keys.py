"""The API keys of a server or router: where they come from, and whether a request has one.

It owns reading and comparing; which paths need a key is the middleware's.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from longspan.config import require
from longspan.secret_file import read_secret_file

KEY_VARIABLE = "LONGSPAN_API_KEY"
_UNNAMED = "default"


@dataclass(frozen=True)
class NamedKey:
    """A key that clients may send. `name` identifies it in messages to the user."""

    name: str
    key: str = field(repr=False)


def read_keys(file: str | None, environment: Mapping[str, str]) -> tuple[NamedKey, ...]:
    """The keys of a file, or without a file the one of the environment, if any. Raises `ConfigError`.

    A line of the file is `name:key`, a key alone, a comment, or empty.
    """
    if file is None:
        value = environment.get(KEY_VARIABLE)
        if value is None:
            return ()
        _check(KEY_VARIABLE, "(hidden)", value.strip())
        return (NamedKey(_UNNAMED, value.strip()),)
    text = read_secret_file("api_key_file", file, "give a file with lines of name:key")
    lines = [line.strip() for line in text.splitlines()]
    keys: dict[str, NamedKey] = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            one = _named(line)
            where = f"{file}, line {number}"
            _check("api_key_file", where, one.key)
            require(one.name not in keys, "api_key_file", where, f"a second key is called {one.name}", "rename one")
            keys[one.name] = one
    remedy = f"put one into it: echo me:$(openssl rand -hex 32) > {file}"
    require(bool(keys), "api_key_file", file, "has no key", remedy)
    return tuple(keys.values())


def name_of(given: bytes, keys: Sequence[NamedKey]) -> str | None:
    """The name of the key in `Bearer KEY`, or None. The time it takes tells neither which one nor how near it is."""
    digest, name = sha256(given).digest(), None
    for one in keys:
        same = hmac.compare_digest(digest, sha256(f"Bearer {one.key}".encode()).digest())
        name = one.name if same else name
    return name


def _named(line: str) -> NamedKey:
    name, colon, key = line.partition(":")
    return NamedKey(name.strip(), key.strip()) if colon else NamedKey(_UNNAMED, line)


def _check(field_name: str, where: str, key: str) -> None:
    sendable = key != "" and key.isascii() and key.isprintable() and " " not in key
    problem = "holds a key that is empty, or of which a header cannot hold every character"
    require(sendable, field_name, where, problem, "take one as from `openssl rand -hex 32`")
