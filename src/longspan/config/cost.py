"""How fast a machine is at attention and exchange: measured when an engine starts, or given.

It owns the constants; the formulas are the cost model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from longspan.errors import ConfigError


@dataclass(frozen=True)
class Fixed:
    """What a schedule takes before any size counts, in seconds: one pcp index with a row, and all of them with one."""

    one: float
    all: float


@dataclass(frozen=True)
class CostConstants:
    """How fast one rank is, in seconds. The defaults are of no machine: a plausible CPU, for tests."""

    call_s: float = 5e-5  # an attention call
    flop_s: float = 4e-11  # a floating-point operation of attention with many rows
    pair_s: float = 0.0  # what a pair of query and key takes for each head beside its products
    read_s: float = 1e-10  # a byte of keys and values attended
    copy_s: float = 2e-10  # a byte of tensors packed or merged
    message_s: float = 1e-4  # a collective, whatever its size
    byte_s: float = 1e-9  # a byte received
    cross_message_s: float = 1e-4  # these two are the same between machines
    cross_byte_s: float = 1e-9
    hidden: float = 0.5  # the part of a transfer that goes on beside computing
    parallelism: float = 0.0  # how many ranks' worth of computing the machine does at once; 0: all
    # what was measured of whole schedules; without it that is put together from calls and messages
    fixed: dict[str, Fixed] = field(default_factory=dict)


def read_constants(field: str, path: str) -> CostConstants:
    """From a JSON file, as `longspan explain --json` prints them. Raises `ConfigError`, which names the field."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=CostConstants)
    except (OSError, msgspec.MsgspecError) as error:
        remedy = "give what `longspan explain --json` prints there"
        raise ConfigError(field, path, f"cannot be read ({error})", remedy) from error
