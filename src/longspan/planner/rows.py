"""Published measurements as rows of a CSV file: one setup and one measured value each.

It owns the columns of the file and their checks; it must not know how anything is predicted.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

import msgspec

from longspan.attention.schedules import SCHEDULE_NAMES
from longspan.config import ParallelConfig
from longspan.errors import ConfigError

QUANTITIES: Mapping[str, str] = {
    "ttft": "time to first token", "ttit": "time between tokens", "kv_tokens": "tokens the KV cache holds",
}  # fmt: skip
_UNITS = {"ms": 1e3, "s": 1.0, "us": 1e6, "tokens": 1.0}
Count = Annotated[int, msgspec.Meta(ge=1)]
Tokens = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Row:
    """One setup and its measured value. Its fields are the columns of the file. Raises `ConfigError`."""

    id: str  # name of the row
    model: str  # built-in name, folder or hub id
    hardware: str  # name of hardware, or a .yaml file
    gpus: Count  # devices in all: tp x pcp x pp
    tp: Count
    pcp: Count
    dcp: Count
    pp: Count
    quantity: str  # a key of `QUANTITIES`
    schedule: str = ""  # '': keys are gathered in prefill, queries in decode
    new_tokens: Tokens = 0  # new tokens of one request
    cached_tokens: Tokens = 0  # tokens of one request that are in the KV cache
    batch: Count = 1  # number of equal requests
    value: float | None = None  # the measured value, in `unit`
    unit: str = ""  # ms, s, us or tokens; '': that of the quantity
    source: str = ""  # where the value was published

    def __post_init__(self) -> None:
        world = self.tp * self.pcp * self.pp
        if world != self.gpus:
            raise ConfigError("gpus", self.gpus, f"tp x pcp x pp = {world}", f"give {world}, or another layout")
        for name, allowed in (("quantity", QUANTITIES), ("schedule", ("", *SCHEDULE_NAMES)), ("unit", ("", *_UNITS))):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(name, value, "unknown", f"use one of {', '.join(x for x in allowed if x)}")
        if (self.unit == "tokens") != (self.quantity == "kv_tokens") and self.unit:
            remedy = "use tokens for kv_tokens, and ms, s or us for times"
            raise ConfigError("unit", self.unit, f"is not a unit of {self.quantity}", remedy)
        try:
            ParallelConfig(self.tp, self.pcp, self.dcp, self.pp)
        except ConfigError as error:
            raise ConfigError("dcp", self.dcp, error.problem, error.remedy) from None
        if self.quantity != "kv_tokens" and self.new_tokens < 1:
            raise ConfigError(
                "new_tokens", self.new_tokens, f"{self.quantity} needs new tokens", "give 1 for decode, or more"
            )

    @property
    def parallel(self) -> ParallelConfig:
        """The layout."""
        return ParallelConfig(self.tp, self.pcp, self.dcp, self.pp)

    @property
    def unit_shown(self) -> str:
        """The unit; without one that of the quantity: tokens or ms."""
        return self.unit or ("tokens" if self.quantity == "kv_tokens" else "ms")

    @property
    def scale(self) -> float:
        """Number of units in a second, or in a token."""
        return _UNITS[self.unit_shown]


_REQUIRED = tuple(entry.name for entry in fields(Row) if entry.default is MISSING)
_COLUMNS = tuple(entry.name for entry in fields(Row))


def read_rows(path: str) -> list[Row]:
    """All rows of a file; lines that begin with # are comments. Raises `ConfigError` with line and column."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("rows", path, f"cannot be read ({error})", "give a CSV file") from error
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not kept:
        raise ConfigError("rows", path, "line 1: no header", f"start the file with the columns {','.join(_COLUMNS)}")
    reader = csv.DictReader((line for _, line in kept), skipinitialspace=True)
    names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for name in _REQUIRED:
        if name not in names:
            remedy = f"give the columns {','.join(_REQUIRED)}"
            raise ConfigError("rows", path, f"line {kept[0][0]}: column {name} is missing", remedy)
    for name in names:
        if name not in _COLUMNS:
            remedy = f"use {', '.join(_COLUMNS)}"
            raise ConfigError("rows", path, f"line {kept[0][0]}: column {name} is unknown", remedy)
    return [_row(f"{path}, line {kept[reader.line_num - 1][0]}", cells) for cells in reader]


def _row(where: str, cells: Mapping[str, str]) -> Row:
    if None in cells or None in cells.values():  # how `csv` marks surplus and missing cells
        raise ConfigError("rows", where, "has more cells than columns, or fewer", "give one cell for each column")
    given = {name: cell.strip() for name, cell in cells.items() if cell.strip()}
    try:
        return msgspec.convert(given, Row, strict=False)
    except msgspec.ValidationError as error:
        wrong = error.__cause__
        if isinstance(wrong, ConfigError):  # raised by `Row`
            problem, remedy = f"column {wrong.field}={wrong.value}: {wrong.problem}", wrong.remedy
        else:
            named = re.search(r"\$\.(\w+)", str(error))
            column = f"column {named[1]}={given[named[1]]}: " if named else ""
            problem, remedy = f"{column}{error}", "correct it"
        raise ConfigError("rows", where, problem, remedy) from None
