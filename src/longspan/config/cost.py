"""How fast a machine is at attention and exchange: measured when an engine starts, or given.

It owns the constants; the formulas are the cost model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fixed:
    """What a schedule takes before any size counts, in seconds: one pcp index with a row, and all of them with one."""

    one: float
    all: float


@dataclass(frozen=True)
class CostConstants:
    """How fast one rank is, in seconds. The defaults are of no machine: a plausible CPU, for tests.

    `call_s` an attention call, `flop_s` a floating-point operation of attention with many rows, `pair_s` what a pair of
    query and key takes for each head beside its products, `read_s` a byte of keys and values attended, `copy_s` a byte
    of tensors packed or merged; `message_s` a collective, whatever its size, `byte_s` a byte received,
    `cross_message_s` and `cross_byte_s` the same between machines; `hidden` the part of a transfer that goes on beside
    computing; `parallelism` how many ranks' worth of computing the machine does at once
    (0: all). `fixed` has what was measured of whole schedules; without it that is put together from calls and messages.
    """

    call_s: float = 5e-5
    flop_s: float = 4e-11
    pair_s: float = 0.0
    read_s: float = 1e-10
    copy_s: float = 2e-10
    message_s: float = 1e-4
    byte_s: float = 1e-9
    cross_message_s: float = 1e-4
    cross_byte_s: float = 1e-9
    hidden: float = 0.5
    parallelism: float = 0.0
    fixed: dict[str, Fixed] = field(default_factory=dict)
