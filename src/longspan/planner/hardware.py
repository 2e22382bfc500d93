"""Machines by name or from a file: what they can do at best, and what of it is achieved.

It owns the table's file, the file's form and the constants' defaults; it must not know models or layouts.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import msgspec
import yaml

from longspan.config import CostConstants
from longspan.errors import ConfigError
from longspan.weights.builtin import by_prefix

_GIB = 1 << 30
_SUFFIXES = (".yaml", ".yml")
_POSITIVE = (
    "tflops", "memory_gb", "memory_tb_s", "intra_gb_s", "inter_gb_s", "matmul", "fp8_matmul", "attention", "memory",
    "intra_link", "inter_link", "tile_rows",
)  # fmt: skip
_TABLES = ("product_s", "sharing")


@dataclass(frozen=True)
class Hardware:
    """One device, and what links it to others.

    At best: `tflops` dense bf16 products (fp32 on a CPU) and `fp8_tflops` (0: as bf16), `exp_tera_s` exponentials in
    10^12 a second (0: they cost nothing), memory in GB (of 2^30 bytes, as vendors count) and TB/s, links in GB/s in
    one direction, inside a machine and between machines.

    Achieved, as a fraction of that: `matmul` and `fp8_matmul` by large products, `attention` by its products,
    `memory` by whatever is read once, `intra_link` and `inter_link`. In seconds: `kernel_s` a kernel, `message_s` a
    collective inside a machine, `cross_message_s` one between machines, `step_s` a step on the host beside all
    kernels, `prompt_token_s` a token of context on the host before a prefill begins.

    `tile_rows`: rows of a product are rounded up to these. `product_s`: seconds a weight element takes by number of
    rows, as (rows, seconds) in order of rows, measured; in place of `tflops` and `memory_tb_s`, except in attention.
    `attention_cost` are measured constants of attention and exchange, in place of those above. `parallelism`: how many
    ranks' worth of computing the machine does at once where ranks share it (0: each rank has a device of its own). With
    `sharing` a layer takes so many times as long, by rows, when each of `cores` computes one of its own, as when all
    compute one; between one layer at once and so many, in proportion.
    With `calls_per_segment` attention is a call for each segment and shard, else one for all.
    `price_per_hour` is a device's, in any currency (0: not known).
    """

    tflops: float
    memory_gb: float
    memory_tb_s: float
    intra_gb_s: float
    inter_gb_s: float
    fp8_tflops: float = 0.0
    exp_tera_s: float = 0.0
    matmul: float = 0.75
    fp8_matmul: float = 0.65
    attention: float = 1.0
    memory: float = 0.8
    intra_link: float = 0.8
    inter_link: float = 0.5
    kernel_s: float = 3e-6
    message_s: float = 1e-5
    cross_message_s: float = 4e-5
    step_s: float = 5e-4
    prompt_token_s: float = 0.0
    tile_rows: int = 128
    parallelism: float = 0.0
    cores: int = 0
    sharing: tuple[tuple[int, float], ...] = ()
    calls_per_segment: bool = False
    product_s: tuple[tuple[int, float], ...] = ()
    attention_cost: CostConstants | None = None
    price_per_hour: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Memory of a device."""
        return self.memory_gb * _GIB

    @property
    def read_s(self) -> float:
        """Seconds a byte of memory takes to be read."""
        return 1 / (self.memory_tb_s * 1e12 * self.memory)

    @property
    def byte_s(self) -> float:
        """Seconds a byte from a device of the same machine takes."""
        return 1 / (self.intra_gb_s * 1e9 * self.intra_link)

    @property
    def cross_byte_s(self) -> float:
        """Seconds a byte from another machine takes."""
        return 1 / (self.inter_gb_s * 1e9 * self.inter_link)

    @property
    def cost(self) -> CostConstants:
        """Constants of the cost model of attention; a transfer hides behind computing altogether."""
        if self.attention_cost is not None:
            return self.attention_cost
        return CostConstants(
            call_s=2 * self.kernel_s,  # attend in splits, combine them
            flop_s=1 / (self.tflops * 1e12 * self.attention),
            pair_s=1e-12 / self.exp_tera_s if self.exp_tera_s else 0.0,
            read_s=self.read_s,
            copy_s=self.read_s,
            message_s=self.message_s,
            byte_s=self.byte_s,
            cross_message_s=self.cross_message_s,
            cross_byte_s=self.cross_byte_s,
            hidden=1.0,
            parallelism=self.parallelism,
        )


def hardware(name: str) -> Hardware:
    """The device of that name, which may be cut short, or of a YAML file.

    Raises `ConfigError` with the names that are near.
    """
    if name.endswith(_SUFFIXES):
        return hardware_from_yaml(name)
    table, short = hardware_table(), name.lower()
    found = by_prefix(short, table)
    if found is None:
        near = [one for one in table if short and one.startswith(short)]
        near = near or get_close_matches(short, table, 3, 0.4) or list(table)
        raise ConfigError("hardware", name, "is not in the table", f"use one of {', '.join(near)}, or a .yaml file")
    return table[found]


def hardware_table() -> dict[str, Hardware]:
    """Every device of the table in the package."""
    table = tomllib.loads(files("longspan").joinpath("hardware.toml").read_text())
    return {name: Hardware(**values) for name, values in table.items()}


def hardware_from_yaml(path: str | Path) -> Hardware:
    """A machine from a file that `hardware_to_yaml` made, or a user, who may leave out what has a default.

    Raises `ConfigError` with line and column, and what was expected there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError("hardware", path, f"cannot be read ({error.strerror})", "give a file's path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = _place(getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or "no text"
        raise ConfigError("hardware", path, f"{place}{problem}", "write fields as `tflops: 989`") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("hardware", path, "line 1, column 1: no fields", "write fields as `tflops: 989`")
    marks = {key.value: key.start_mark for key, _ in node.value}
    known = [entry.name for entry in fields(Hardware)]
    for name in map(str, values):
        if name not in known:
            near = get_close_matches(name, known, 1) or known
            raise _at(path, marks, name, "is no field of a machine", f"a field is expected: {', '.join(near)}")
    try:
        found = msgspec.convert(values, Hardware, strict=False)
    except msgspec.ValidationError as error:
        named = re.search(r"\$\.(\w+)", str(error))
        raise _at(path, marks, named[1] if named else "", str(error), "correct it") from error
    _check(path, marks, found)
    return found


def _check(path: str | Path, marks: Mapping[str, yaml.Mark], found: Hardware) -> None:
    for name in _POSITIVE:
        if not getattr(found, name) > 0:
            raise _at(path, marks, name, f"{getattr(found, name)} given", "a positive number is expected")
    for entry in fields(Hardware):
        value = getattr(found, entry.name)
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise _at(path, marks, entry.name, f"{value} given", "a number that is not negative is expected")
    for name in _TABLES:
        table = getattr(found, name)
        rows = [rows for rows, _ in table]
        if rows != sorted(set(rows)) or any(row < 1 or not value > 0 for row, value in table):
            raise _at(path, marks, name, "not in order of rows", "pairs [rows, positive number] are expected")


def _at(path: str | Path, marks: Mapping[str, yaml.Mark], name: str, problem: str, remedy: str) -> ConfigError:
    """An error in a field, at its place in the file."""
    return ConfigError("hardware", path, f"{_place(marks.get(name))}{f'{name}: ' if name else ''}{problem}", remedy)


def _place(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def hardware_to_yaml(machine: Hardware) -> str:
    """The text that `hardware_from_yaml` reads."""
    values = {name: value for name, value in asdict(machine).items() if value is not None}
    for name in _TABLES:
        values[name] = [list(entry) for entry in getattr(machine, name)]
    return str(yaml.safe_dump(values, sort_keys=False))
