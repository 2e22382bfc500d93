"""Measures the constants of this machine with the engine's own kernels and executors.

It owns what is run and timed, and how the times become a `Hardware`; it must not know how times are predicted from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from longspan.bench.constants import measure_constants
from longspan.config import CacheConfig, CostConstants, EngineConfig, ParallelConfig
from longspan.engine.setup import resolve
from longspan.models.registry import load_config
from longspan.planner.hardware import Hardware
from longspan.planner.linear import passed_elements
from longspan.planner.measured_engine import EngineBench, EngineTimes, plain_folder
from longspan.planner.measured_layers import KERNELS_PER_LAYER, LayerBench
from longspan.planner.models import find_config
from longspan.planner.timing import Bench, Report

_STREAM_BYTES = 1 << 28  # more than the processor's caches hold
_DEFAULT_LINK_GB_S = 25.0  # rate of links between GPUs, which are not measured


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration."""

    machine: Hardware
    notes: tuple[str, ...]  # which timings were not reproducible, with the difference; for users


@torch.inference_mode()
def calibrate(model: str, executor: str, report: Report) -> Calibrated:
    """Measure this machine with the shapes of a model (folder, hub id or built-in name). Takes about two minutes.

    `report` is called with the name of each measurement when it starts. Raises `ModelError`.
    """
    values = find_config(model)
    shape = load_config(values)
    gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    bench = Bench(torch.device("cuda" if gpu else "cpu"), cores, report)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # `Bench` needs this
    stream = _stream(bench)
    made = LayerBench(bench, shape)
    layers = made.measure()
    sharing = () if gpu else made.sharing()
    cost, engine = _attention(bench, values, executor, made, sharing[0][1] if sharing else 1.0)
    torch.set_num_threads(threads)
    link = _DEFAULT_LINK_GB_S if gpu else min(1e-9 / max(cost.byte_s, 1e-15), 1e-12 / stream * 1e3)
    machine = Hardware(
        tflops=max(2 * rows / seconds for rows, seconds in layers.product_s) / 1e12,
        memory_gb=_memory_bytes(bench.device) / (1 << 30),
        memory_tb_s=1e-12 / stream,
        intra_gb_s=link,
        inter_gb_s=link,
        matmul=1.0,
        attention=1.0,
        memory=stream / (layers.read_s + engine.row_s / (passed_elements(shape) * bench.dtype.itemsize)),
        intra_link=1.0,
        inter_link=1.0,
        kernel_s=layers.kernel_s + engine.layer_s / KERNELS_PER_LAYER,
        message_s=cost.message_s,
        cross_message_s=cost.cross_message_s,
        step_s=engine.step_s,
        tile_rows=1,
        parallelism=0.0 if gpu else 1.0,
        calls_per_segment=not gpu,
        cores=0 if gpu else cores,
        sharing=sharing,
        product_s=layers.product_s,
        attention_cost=cost,
    )
    return Calibrated(machine, tuple(bench.notes))


def _stream(bench: Bench) -> float:
    """Seconds to read one byte from memory."""
    big = torch.ones(_STREAM_BYTES // bench.dtype.itemsize, dtype=bench.dtype, device=bench.device)
    return bench.seconds("memory", big.sum) / _STREAM_BYTES


def _attention(
    bench: Bench, values: Mapping[str, Any], executor: str, layers: LayerBench, slowdown: float
) -> tuple[CostConstants, EngineTimes]:
    """Constants of attention and exchange, and the times of the engine's steps.

    Attention is measured on one rank that has the machine to itself, exchange between two ranks that share it. On a GPU
    the exchange is not measured. `slowdown` is how many times longer a layer takes when both ranks compute.
    """
    engines = EngineBench(bench, values, executor, layers)
    found = engines.measure()
    with plain_folder(values, 1, None) as folder:
        one = _cost(folder, "threads", 1)
        own = replace(one, call_s=found.call_s, flop_s=found.flop_s, read_s=found.read_s)
        if bench.device.type == "cuda":
            return own, found
        two = _cost(folder, executor, 2)
    return replace(
        own, message_s=two.message_s, byte_s=two.byte_s, cross_message_s=two.cross_message_s,
        cross_byte_s=two.cross_byte_s, hidden=two.hidden, parallelism=1.0,
        fixed=engines.fixed(two.fixed, found.layer_s, slowdown),
    ), found  # fmt: skip


def _cost(folder: str, executor: str, ranks: int) -> CostConstants:
    """The constants that an engine with `ranks` PCP ranks measures when it starts."""
    cache = CacheConfig(pages_per_shard=(4,) * ranks)
    config = EngineConfig(folder, executor=executor, parallel=ParallelConfig(1, ranks, 1), cache=cache)
    return measure_constants(resolve(config))


def _memory_bytes(device: torch.device) -> int:
    """Bytes of memory of the device, or of the machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
