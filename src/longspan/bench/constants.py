"""Measure the constants of the cost model on this machine, on ranks without an engine.

It owns starting the ranks; `attention/calibrate.py` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.attention.calibrate import combine
from longspan.bench.ranks import MakeGroup, run_on_ranks
from longspan.config import CostConstants, EngineConfig
from longspan.engine.rank.rank_attention import measure_cost
from longspan.engine.setup import EngineSetup, resolve


@dataclass(frozen=True)
class _Measure:
    """The function that every rank runs. It is a class so that it can be pickled."""

    # the layout and the model
    config: EngineConfig

    def __call__(self, rank: int, make_group: MakeGroup, traffic: object) -> CostConstants:
        setup = resolve(self.config, needs_weights=False)
        device = setup.device(rank if setup.config.executor == "processes" else 0)
        return measure_cost(setup, rank, make_group(setup.grid.context_group(rank)), device)


def measure_constants(setup: EngineSetup) -> CostConstants:
    """The constants of a layout, measured by all its ranks at the same time: threads or processes, by its executor."""
    ranks = run_on_ranks(setup.config.executor, setup.grid.world_size, _Measure(setup.config), setup.device_type)
    return combine(ranks)
