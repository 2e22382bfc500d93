"""Hardware by name or from a file: its peak rates, and the fraction of them that is achieved.

It owns the table `hardware.toml`, the format of files and the defaults; it must not know models or layouts.
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
    """One device and its links to others: peak rates, and the fractions of them that are achieved."""

    # dense bf16 products, TFLOP/s (fp32 on a CPU)
    tflops: float
    # memory in GB of 2^30 bytes, as vendors count
    memory_gb: float
    # memory bandwidth, TB/s
    memory_tb_s: float
    # links in one direction, GB/s: inside a machine (or rack), and between machines
    intra_gb_s: float
    inter_gb_s: float
    # dense FP8 products, TFLOP/s; 0: as fast as bf16
    fp8_tflops: float = 0.0
    # exponentials, 10^12 per second; 0: their time is neglected
    exp_tera_s: float = 0.0
    # fractions of the peak that are achieved: by large bf16 and FP8 products, by the products of attention
    matmul: float = 0.75
    fp8_matmul: float = 0.65
    attention: float = 1.0
    # fractions of the bandwidth that are achieved: by memory, and by the two links
    memory: float = 0.8
    intra_link: float = 0.8
    inter_link: float = 0.5
    # seconds of a kernel, of a collective inside a machine, and of one between machines, whatever their sizes
    kernel_s: float = 3e-6
    message_s: float = 1e-5
    cross_message_s: float = 4e-5
    # seconds of the host for a step, and for each token of context before a prefill starts
    step_s: float = 5e-4
    prompt_token_s: float = 0.0
    # rows of a product are rounded up to a multiple of this
    tile_rows: int = 128
    # how many ranks compute at full speed at once, where ranks share the machine; 0: each rank has its own device
    parallelism: float = 0.0
    # processor cores that ranks share; only used with `sharing`
    cores: int = 0
    # (rows, factor), measured: how many times longer a layer takes when each core computes its own layer than when all
    # cores compute one. Fewer layers at once are interpolated linearly
    sharing: tuple[tuple[int, float], ...] = ()
    # whether attention makes a call for each segment and shard, instead of one call for all
    calls_per_segment: bool = False
    # (rows, seconds for each weight element), measured; replaces `tflops` and `memory_tb_s` outside attention
    product_s: tuple[tuple[int, float], ...] = ()
    # measured constants of attention and exchange; they replace those derived from the fields above
    attention_cost: CostConstants | None = None
    # price of a device, in any currency; 0: not known
    price_per_hour: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Bytes of memory of a device."""
        return self.memory_gb * _GIB

    @property
    def read_s(self) -> float:
        """Seconds to read one byte from memory."""
        return 1 / (self.memory_tb_s * 1e12 * self.memory)

    @property
    def byte_s(self) -> float:
        """Seconds to receive one byte from a device of the same machine."""
        return 1 / (self.intra_gb_s * 1e9 * self.intra_link)

    @property
    def cross_byte_s(self) -> float:
        """Seconds to receive one byte from another machine."""
        return 1 / (self.inter_gb_s * 1e9 * self.inter_link)

    @property
    def cost(self) -> CostConstants:
        """Constants of the attention cost model: the measured ones, or derived from the fields.

        Derived constants take a ring's transfers to overlap completely with computing.
        """
        if self.attention_cost is not None:
            return self.attention_cost
        return CostConstants(
            call_s=2 * self.kernel_s,  # one kernel attends in splits, one combines them
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
    """The device of that name, or of a unique prefix of one, or of a YAML file.

    Raises `ConfigError`, which names similar names.
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
    """All devices of `hardware.toml`, by name."""
    table = tomllib.loads(files("longspan").joinpath("hardware.toml").read_text())
    return {name: Hardware(**values) for name, values in table.items()}


def hardware_from_yaml(path: str | Path) -> Hardware:
    """Read a device from a YAML file with the fields of `Hardware`; fields with a default may be left out.

    Raises `ConfigError`, which names line, column and what was expected there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError("hardware", path, f"cannot be read ({error.strerror})", "give a file's path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = _place(getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or "is not text"
        raise ConfigError("hardware", path, f"{place}{problem}", "write fields as `tflops: 989`") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("hardware", path, "line 1, column 1: no fields", "write fields as `tflops: 989`")
    marks = {key.value: key.start_mark for key, _ in node.value}
    known = [entry.name for entry in fields(Hardware)]
    for name in map(str, values):
        if name not in known:
            near = get_close_matches(name, known, 1) or known
            raise _at(path, marks, name, "is not a field of a device", f"use a known field: {', '.join(near)}")
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
            raise _at(path, marks, name, f"{getattr(found, name)} is not positive", "give a positive number")
    for entry in fields(Hardware):
        value = getattr(found, entry.name)
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise _at(path, marks, entry.name, f"{value} is negative or not finite", "give 0 or more")
    for name in _TABLES:
        table = getattr(found, name)
        rows = [rows for rows, _ in table]
        if rows != sorted(set(rows)) or any(row < 1 or not value > 0 for row, value in table):
            raise _at(path, marks, name, "is not in order of rows", "give pairs [rows, positive number]")


def _at(path: str | Path, marks: Mapping[str, yaml.Mark], name: str, problem: str, remedy: str) -> ConfigError:
    """The error of a field, with its line and column in the file."""
    return ConfigError("hardware", path, f"{_place(marks.get(name))}{f'{name}: ' if name else ''}{problem}", remedy)


def _place(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def hardware_to_yaml(machine: Hardware) -> str:
    """The device as text that `hardware_from_yaml` reads."""
    values = {name: value for name, value in asdict(machine).items() if value is not None}
    for name in _TABLES:
        values[name] = [list(entry) for entry in getattr(machine, name)]
    return str(yaml.safe_dump(values, sort_keys=False))
