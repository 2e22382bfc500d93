"""Parsing and checks of values that users give. Errors name the field, the value and the remedy."""

from __future__ import annotations

import re

from longspan.errors import ConfigError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def require(ok: bool, field_name: str, value: object, problem: str, remedy: str) -> None:
    """Raise `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(field_name, value, problem, remedy)


def require_choice(field_name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    require(value in choices, field_name, value, "unknown choice", f"use one of {', '.join(choices)}")


def parse_bytes(field_name: str, text: str) -> int:
    """A number of bytes from `512M`, `1.5G` or a plain number. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ConfigError(field_name, text, "is not a size", "give bytes, or a number with k, M, G or T")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_integers(field_name: str, text: str) -> tuple[int, ...]:
    """Integers from a comma-separated list. Raises `ConfigError`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(field_name, text, "is not a list of integers", "write them as 1,2,3") from None
