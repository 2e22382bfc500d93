"""Constants of the cost model: how fast a machine is at attention and exchange.

They are measured when an engine starts, or given. This module owns the constants; `attention/cost.py` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from longspan.errors import ConfigError


@dataclass(frozen=True)
class Fixed:
    """The time of a schedule that does not depend on sizes, in seconds."""

    one: float  # when one pcp index has one row
    all: float  # when every pcp index has one row


@dataclass(frozen=True)
class CostConstants:
    """How fast one rank is. Names that end in `_s` are seconds. The defaults are for tests: a plausible CPU."""

    call_s: float = 5e-5  # an attention call
    flop_s: float = 4e-11  # a floating-point operation of attention with many rows
    pair_s: float = 0.0  # a pair of query and key in one head, besides its products
    read_s: float = 1e-10  # a byte of keys and values that attention reads
    copy_s: float = 2e-10  # a byte of tensors that are packed or merged
    message_s: float = 1e-4  # a collective inside a machine, whatever its size
    byte_s: float = 1e-9  # a byte received inside a machine
    cross_message_s: float = 1e-4  # a collective between machines, whatever its size
    cross_byte_s: float = 1e-9  # a byte received from another machine
    hidden: float = 0.5  # fraction of a ring's transfer that overlaps with compute
    parallelism: float = 0.0  # how many ranks compute at full speed at once; 0: all
    # measured fixed times by schedule; without one it is estimated from `call_s` and `message_s`
    fixed: dict[str, Fixed] = field(default_factory=dict)


def read_constants(field: str, path: str) -> CostConstants:
    """Constants from a JSON file, as `longspan explain --json` prints them. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=CostConstants)
    except (OSError, msgspec.MsgspecError) as error:
        remedy = "give what `longspan explain --json` prints as `constants`"
        raise ConfigError(field, path, f"cannot be read ({error})", remedy) from error
