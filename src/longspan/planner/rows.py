"""Published measurements as rows of a CSV file: one setup, one number.

It owns the file's columns and the checks of what stands in them; it must not know how anything is predicted.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.attention.schedules import SCHEDULE_NAMES
from longspan.config import ParallelConfig
from longspan.errors import ConfigError

QUANTITIES: Mapping[str, str] = {
    "ttft": "time to first token", "ttit": "time between tokens", "kv_tokens": "tokens the KV cache holds",
}  # fmt: skip
_UNITS = {"ms": 1e3, "s": 1.0, "us": 1e6, "tokens": 1.0}
_REQUIRED = ("id", "model", "hardware", "gpus", "tp", "pcp", "dcp", "pp", "quantity")
_COUNTS = ("gpus", "tp", "pcp", "dcp", "pp")
_COLUMNS = (*_REQUIRED, "source", "schedule", "new_tokens", "cached_tokens", "batch", "value", "unit")


@dataclass(frozen=True)
class Row:
    """One setup and, where it is known, what was measured: `value` in `unit`. Raises `ConfigError`.

    Token counts are of one request; `batch` requests are alike. An empty `schedule` is what engines do that name
    none: keys are gathered for a prompt, queries for decoding.
    """

    id: str
    model: str
    hardware: str
    gpus: int
    tp: int
    pcp: int
    dcp: int
    pp: int
    quantity: str
    schedule: str = ""
    new_tokens: int = 0
    cached_tokens: int = 0
    batch: int = 1
    value: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        world = self.tp * self.pcp * self.pp
        if world != self.gpus:
            raise ConfigError("gpus", self.gpus, f"tp x pcp x pp = {world}", f"give {world}, or another layout")
        for name, allowed in (("quantity", QUANTITIES), ("schedule", ("", *SCHEDULE_NAMES)), ("unit", ("", *_UNITS))):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(name, value, "unknown", f"use one of {', '.join(x for x in allowed if x)}")
        if (self.unit == "tokens") != (self.quantity == "kv_tokens") and self.unit:
            raise ConfigError("unit", self.unit, f"is not one of {self.quantity}", "use tokens for kv_tokens, else ms")
        try:
            ParallelConfig(self.tp, self.pcp, self.dcp, self.pp)
        except ConfigError as error:
            raise ConfigError("dcp", self.dcp, error.problem, error.remedy) from None
        if self.quantity != "kv_tokens" and self.new_tokens < 1:
            raise ConfigError("new_tokens", self.new_tokens, f"{self.quantity} needs some", "give 1 to decode, or more")

    @property
    def parallel(self) -> ParallelConfig:
        """The layout."""
        return ParallelConfig(self.tp, self.pcp, self.dcp, self.pp)

    @property
    def unit_shown(self) -> str:
        """The unit, or the quantity's own: tokens or ms."""
        return self.unit or ("tokens" if self.quantity == "kv_tokens" else "ms")

    @property
    def scale(self) -> float:
        """Units in a second, or in a token."""
        return _UNITS[self.unit_shown]


def read_rows(path: str) -> list[Row]:
    """All rows of a file; lines that begin with # are comments. Raises `ConfigError` with line and column."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("rows", path, f"cannot be read ({error})", "give a CSV file") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise ConfigError("rows", path, "line 1: no header", f"begin with the columns {','.join(_COLUMNS)}")
    (first, header), *rest = numbered
    names = [name.strip() for name in header.split(",")]
    for name in _REQUIRED:
        if name not in names:
            raise ConfigError("rows", path, f"line {first}: column {name} is missing", f"have {','.join(_REQUIRED)}")
    for name in names:
        if name not in _COLUMNS:
            raise ConfigError("rows", path, f"line {first}: column {name} is unknown", f"use {', '.join(_COLUMNS)}")
    return [_row(path, number, names, next(csv.reader([line]))) for number, line in rest]


def _row(path: str, line: int, names: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(names):
        raise ConfigError(
            "rows", path, f"line {line}: {len(cells)} cells, {len(names)} columns", "give each column a cell, or none"
        )
    given = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
    where = f"{path}, line {line}"
    counts = {name: _count(where, name, given, 1) for name in _COUNTS}
    tokens = {
        name: _count(where, name, given, least)
        for name, least in (("new_tokens", 0), ("cached_tokens", 0), ("batch", 1))
        if given.get(name)
    }
    texts = {name: given[name] for name in ("id", "model", "hardware", "quantity", "schedule", "unit") if name in given}
    try:
        return Row(**texts, **counts, **tokens, value=_number(where, given.get("value", "")))  # type: ignore[arg-type]
    except ConfigError as error:
        if error.field == "rows":
            raise
        raise ConfigError("rows", where, f"column {error.field}={error.value}: {error.problem}", error.remedy) from None


def _count(where: str, name: str, cells: dict[str, str], least: int) -> int:
    text = cells[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError("rows", where, f"column {name}: {text!r}", f"a whole number of at least {least} is expected")
    return int(text)


def _number(where: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise ConfigError("rows", where, f"column value: {text!r}", "a number or nothing is expected") from None
