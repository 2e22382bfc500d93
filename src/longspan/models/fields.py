"""Read the fields of a model's config.json, each checked as it is read.

It owns the checks of single fields; what a field means is the reader's.

A file may hold anything: no value reaches the engine unchecked, and no size is so large that a loop over it hangs.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr
from typing import Any

from longspan.errors import ModelError

MAX_SIZE = 1 << 24  # one side of a tensor; the bytes of a matrix then fit in 64 bits
MAX_POSITIONS = (1 << 31) - 1
MAX_LAYERS = 1 << 12  # they are built one by one
_MAX_NUMBER = 1e30
_BRIEF = Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60


def shown(value: object) -> str:
    """The representation of a value, short enough for a message."""
    return _BRIEF.repr(value)


class Fields:
    """A configuration dict whose fields are checked as they are read. All methods raise `ModelError`.

    `name` is the file's name, or that of the field which holds the dict.
    """

    def __init__(self, values: Mapping[str, Any], name: str = "config.json") -> None:
        self._values = values
        self._name = name

    def names(self, name: str) -> bool:
        """Whether the file has the field, even if it is null."""
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or `default` if it is missing or null. It is not checked."""
        value = self._values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, least: int = 0, most: int = MAX_SIZE) -> int:
        """The value of a field that must be an integer from `least` to `most`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, value, f"must be an integer in {least}..{most}")
        return value

    def size(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """The value of a field that must be a positive integer."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, value, "must be a positive integer")
        return self.count(name, default, 1, most)

    def number(self, name: str, default: float | None = None, least: float = 0.0, most: float = _MAX_NUMBER) -> float:
        """The value of a field that must be a number above `least` and at most `most`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > least:
            problem = "must be a positive number" if least == 0 else f"must be a number above {least:g}"
            raise self.wrong(name, value, problem)
        if value > most:
            raise self.wrong(name, value, f"must be at most {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """The value of a field that must be true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "must be true or false")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """The value of a field that must be one of `choices`."""
        value = self.get(name, default)
        if value not in choices:
            raise self.wrong(name, value, f"must be one of {', '.join(choices)}")
        return str(value)

    def ids(self, name: str) -> tuple[int, ...]:
        """The value of a field that is one token id, a list of them, or missing."""
        value = self.get(name, [])
        found = tuple(value) if isinstance(value, list | tuple) else (value,)
        for each in found:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= MAX_SIZE:
                raise self.wrong(name, value, "must be a token id or a list of them")
        return found

    def counts(self, name: str) -> tuple[int, ...]:
        """The value of a field that is a list of integers from 0 on, or missing."""
        value = self.get(name, [])
        if not isinstance(value, list | tuple):
            raise self.wrong(name, value, "must be a list of integers")
        return self.ids(name)

    def inner(self, name: str) -> Fields:
        """The fields of an object; none if it is missing."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "must be an object")
        return Fields(value, f"{self._name}: {name}")

    def wrong(self, name: str, value: object, problem: str) -> ModelError:
        """The error for the value of a field."""
        return ModelError(f"{self._name}: {name}={shown(value)} {problem}; fix the model's config.json")
