"""The cost model's constants of this machine, on ranks without an engine.

It owns the ranks that measure; what is measured is attention's own calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.attention.calibrate import combine
from longspan.bench.ranks import MakeGroup, run_on_ranks
from longspan.config import CostConstants, EngineConfig
from longspan.engine.rank.build import measure_cost
from longspan.engine.setup import EngineSetup, resolve


@dataclass(frozen=True)
class _Measure:
    """What every rank runs."""

    config: EngineConfig

    def __call__(self, rank: int, make_group: MakeGroup, traffic: object) -> CostConstants:
        setup = resolve(self.config, needs_weights=False)
        device = setup.device(rank if setup.config.executor == "processes" else 0)
        return measure_cost(setup, rank, make_group(setup.grid.context_group(rank)), device)


def measure_constants(setup: EngineSetup) -> CostConstants:
    """Of all ranks of a layout together, started as its executor would."""
    ranks = run_on_ranks(setup.config.executor, setup.grid.world_size, _Measure(setup.config), setup.device_type)
    return combine(ranks)
