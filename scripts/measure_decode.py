"""A decode step against its floor: the bytes of weights and keys it must read, at the device's measured copy rate.

    python scripts/measure_decode.py MODEL [--device auto] [--batch 1,8,32] [--context 1024,8192] [--output 64]

Each case runs with recorded steps and without, and transformers runs on the same weights, all in turn. Prints a table
and one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from longspan.bench.contestants import LongspanContestant, TransformersContestant
from longspan.bench.kernels.ceilings import measure_ceilings
from longspan.bench.latency import BatchLoad, run_latency
from longspan.clock import make_clock
from longspan.config import CacheConfig, EngineConfig, SchedulerConfig
from longspan.engine.cores import threads_per_rank
from longspan.engine.setup import EngineSetup, resolve
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import Hardware
from longspan.weights.formats import WeightFormat

CACHE_BYTES = 12 << 30  # of each side: they share the device


def step_bytes(setup: EngineSetup, batch: int, context: int) -> float:
    """What a decode step must read: every weight of a product once, every cached token of every request once."""
    machine = Hardware(tflops=1, memory_gb=1, memory_tb_s=1, intra_gb_s=1, inter_gb_s=1)
    size = setup.dtype.itemsize
    weights = Deployment(setup.model, machine, setup.config.parallel, WeightFormat(*(size,) * 4), size).weight_bytes
    return weights + batch * context * setup.layout.bytes_per_token


def measure(setup: EngineSetup, batch: int, context: int, output: int, bytes_per_s: float) -> dict[str, Any]:
    """One case."""
    config = setup.config
    load = BatchLoad(context, output, batch, 3, 1, config.seed, setup.model.vocab_size)
    contestants = {
        "recorded": LongspanContestant(config),
        "eager": LongspanContestant(replace(config, enforce_eager=True)),
        "transformers": TransformersContestant(config, threads_per_rank(setup.config)),
    }
    report = run_latency(load, contestants, print)
    floor = step_bytes(setup, batch, context + output // 2) / bytes_per_s
    steps = {name: batch / report[name]["decode_tokens_per_s"]["median"] for name in contestants}
    return {
        "batch": batch, "context": context, "floor_ms": floor * 1e3,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in steps.items()},
        "over_floor": steps["recorded"] / floor, "times_transformers": steps["transformers"] / steps["recorded"],
    }  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", default="1024,8192")
    parser.add_argument("--output", type=int, default=64)
    options = parser.parse_args()
    config = EngineConfig(
        options.model, device=options.device, cache=CacheConfig(memory_bytes=CACHE_BYTES, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_batched_tokens=8192),
    )  # fmt: skip
    setup = resolve(config)
    device = setup.device()
    copy = measure_ceilings(make_clock(device, 0.3), device, setup.dtype).copy
    rows = []
    for batch in map(int, options.batch.split(",")):
        for context in map(int, options.context.split(",")):
            rows.append(measure(setup, batch, context, options.output, copy))
            print({name: round(value, 3) for name, value in rows[-1].items()})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "copy_bytes_per_s": copy, "rows": rows}))


if __name__ == "__main__":
    main()
