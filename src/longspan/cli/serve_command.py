"""The `longspan serve` command that starts a planned layout, or the reason why there is none.

It owns the translation of a forecast into options of `longspan serve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.weights.builtin import builtin_name, hub_id
from longspan.weights.formats import WeightFormat
from longspan.weights.source import quantisation_problem

if TYPE_CHECKING:
    from longspan.planner.deployment import Deployment
    from longspan.planner.forecast import Forecast

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}  # data types by the planner's names: the engine's names
_DEQUANTISED = ("fp8", "mxfp4")  # weight formats that can be dequantised at load


@dataclass(frozen=True)
class Served:
    """How `serve` is told to load the planned model."""

    model: str  # hub id, folder or file
    quantization: str = ""  # value of `--quantization`; '' for the default
    problem: str | None = None  # why the planned weights cannot be served, with the remedy; None if they can


def served(model: str, values: Mapping[str, Any], planned: WeightFormat, dtype: str) -> Served:
    """How to serve the model named `model`, whose config.json is `values`, with weights of the format `planned`."""
    built_in = None if Path(model).expanduser().exists() else builtin_name(model)
    name = model if built_in is None else hub_id(values)
    if name is None or " with " in model:
        return Served(model, problem=f"no checkpoint of {model} is known on the hub: give a folder with its weights")
    problem = quantisation_problem(values)
    if problem is not None:
        return Served(name, problem=f"{name}: {problem}")
    method = (values.get("quantization_config") or {}).get("quant_method")
    as_stored = planned == WeightFormat.of(values, dtype)
    dequantised = method in _DEQUANTISED and planned == WeightFormat.named(dtype, dtype)
    if as_stored and method == "mxfp4" and dtype == "fp16":
        return Served(name, problem="MXFP4 weights are dequantised at load in fp16: plan with --weight-dtype fp16")
    if not (as_stored or dequantised):
        return Served(
            name, problem=f"the weights of {name} have another format: give a folder with weights of the planned format"
        )
    return Served(name, "none" if dequantised else "")


def serve_command(model: Served, base: Deployment, one: Forecast, dtype: str, kv_dtype: str, tokens: int) -> str | None:
    """The command for a layout and requests of up to `tokens` tokens; None if the planned weights cannot be served."""
    if model.problem is not None:
        return None
    sizes = zip(("-tp", "-pcp", "-dcp", "-pp"), one.sizes, strict=True)
    options = [f"{name} {size}" for name, size in sizes if size != 1]
    if one.parallel.enable_expert_parallel:
        options.append("--enable-expert-parallel")
    ranks = one.parallel.world_size
    if ranks > base.gpus_per_node:
        options.append("--executor ray --ray-address 127.0.0.1:6379")
    elif ranks > 1:
        options.append("--executor processes")
    options.append(f"--dtype {DTYPES[dtype]}")
    if model.quantization:
        options.append(f"--quantization {model.quantization}")
    if kv_dtype not in ("auto", dtype):
        options.append(f"--kv-cache-dtype {kv_dtype}")
    options += [
        f"--max-model-len {min(tokens, base.model.max_position_embeddings)}",
        f"--max-num-batched-tokens {base.max_num_batched_tokens}",
        f"--kv-cache-memory-bytes {max(1, math.floor(one.cache_bytes / 2**20))}M",
    ]
    return " ".join(["longspan serve", model.model, *options])


def command_notes(base: Deployment, one: Forecast, tokens: int) -> list[str]:
    """Notes for the user about the command."""
    positions, ranks = base.model.max_position_embeddings, one.parallel.world_size
    notes = []
    if tokens > positions:
        notes.append(f"note: the model has {positions:,} positions, so `serve` refuses requests of {tokens:,} tokens")
    if ranks > base.gpus_per_node:
        notes.append(
            f"note: run the command on the head of a Ray cluster of {-(-ranks // base.gpus_per_node)} machines, which "
            "`ray start --head --port 6379` starts"
        )
    return notes
