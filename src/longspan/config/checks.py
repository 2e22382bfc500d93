"""Checks of a user's options: what fails names the field, the value and the remedy."""

from __future__ import annotations

from longspan.errors import ConfigError


def require(ok: bool, field_name: str, value: object, problem: str, remedy: str) -> None:
    """Raise `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(field_name, value, problem, remedy)


def require_choice(field_name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    require(value in choices, field_name, value, "unknown choice", f"use one of {', '.join(choices)}")
