"""Options: fields of config records that users can set, declared once.

The flag, the keyword of `LLM`, their help and docs/cli.md are derived from the field. This module owns the declaration
and the conversion of options to records; it must not know particular records or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, TypeVar, cast, get_type_hints

from longspan.errors import ConfigError

OPTION = "option"  # key of the `Option` in a field's metadata
T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """How users set a field."""

    help: str
    name: str = ""  # name of the keyword; '' for the field's name
    flag: str | None = ""  # name of the flag, with underscores; '' for the keyword's name, None for no flag
    short: str = ""  # second flag, as in -tp
    metavar: str | None = None  # placeholder of the value in --help
    parse: Callable[[str, str], Any] | None = None  # (name of the flag, text) -> value
    text: str | None = None  # the default as text, if values are parsed; None to show no default
    default: Any = None  # the default that users see, MISSING if there is none; set by `described`
    kind: Any = None  # type of the field; set by `described`

    def read(self, value: Any) -> Any:
        """The value for the field. Raises `ConfigError` for a text that cannot be parsed."""
        if isinstance(value, str):
            return value if self.parse is None else self.parse(self.flag or self.name, value)
        return tuple(value) if isinstance(value, Sequence) else value


def option(default: T, help: str, **how: Any) -> T:
    """Declare a field that users can set; `how` are further fields of `Option`."""
    return field(default=default, metadata={OPTION: Option(help, **how)})


def described(record: type[Any]) -> Iterator[tuple[str, Any, Option | None]]:
    """(name, type, option) of every field of a record; the option is None for a field that users cannot set."""
    kinds = get_type_hints(record)
    for one in fields(record):
        found, kind = one.metadata.get(OPTION), kinds[one.name]
        if found is not None:
            name = found.name or one.name
            default = found.text if found.parse else None if is_dataclass(kind) else one.default
            found = replace(found, name=name, flag=name if found.flag == "" else found.flag, default=default, kind=kind)
        yield one.name, kind, found


def keywords(record: type[Any]) -> Iterator[Option]:
    """The keywords of a record, those of nested records included. A nested record may be a keyword itself instead."""
    for _, kind, found in described(record):
        if found is not None:
            yield found
        elif is_dataclass(kind):
            yield from keywords(cast(type[Any], kind))


def flags(record: type[Any]) -> Iterator[Option]:
    """The options of a record and of its nested records that have a flag."""
    for _, kind, found in described(record):
        if is_dataclass(kind):
            yield from flags(cast(type[Any], kind))
        elif found is not None and found.flag is not None:
            yield found


def build(record: type[T], given: Mapping[str, Any]) -> T:
    """Build a record and its nested records from values by name of the option; None keeps the default.

    Raises `ConfigError`.
    """
    values: dict[str, Any] = {}
    for name, kind, found in described(record):
        value = None if found is None else given.get(found.name)
        if found is not None and value is not None:
            values[name] = found.read(value)
        elif is_dataclass(kind):
            values[name] = build(cast(type[Any], kind), given)
    return record(**values)


def check_keywords(record: type[Any], given: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a keyword that is not an option of the record."""
    known = [one.name for one in keywords(record)]
    for name, value in given.items():
        if name not in known:
            (nearest,) = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(name, value, "is not an option", f"the most similar one is {nearest}")


def lists_options(record: type[Any], typed: type[Any]) -> Callable[[Function], Function]:
    """Decorator: list the options that a function takes as `**options` in its signature and docstring.

    `typed` is the TypedDict of these options.
    """

    kinds = {name: getattr(kind, "__forward_arg__", kind) for name, kind in typed.__annotations__.items()}

    def listed(function: Function) -> Function:
        own = signature(function)
        shown = [one for one in keywords(record) if one.name not in own.parameters]
        added = [
            Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=kinds.get(one.name, one.kind))
            for one in shown
        ]
        fixed = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        ordered = sorted([*added, *fixed], key=lambda one: one.kind)
        function.__signature__ = own.replace(parameters=ordered)  # type: ignore[attr-defined]
        function.__doc__ = "\n".join([function.__doc__ or "", "", *(f"{one.name}: {one.help}" for one in shown)])
        return function

    return listed
