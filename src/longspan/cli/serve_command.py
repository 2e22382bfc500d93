"""The command that starts a planned layout, or why there is none.

It owns what has to be said to `longspan serve`; the plan is the planner's.
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

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # a plan's names of them, and the engine's
_DEQUANTISED = ("fp8", "mxfp4")  # weights that can be loaded as numbers of the activations' type


@dataclass(frozen=True)
class Served:
    """A model as `serve` takes it."""

    model: str  # hub id, folder or file
    quantization: str = ""  # what `--quantization` has to be; '' for its default
    problem: str | None = None  # why the planned weights cannot be served, with the remedy


def served(model: str, values: Mapping[str, Any], planned: WeightFormat, dtype: str) -> Served:
    """From what the user called the model, its config.json, and the weights that were planned."""
    built_in = None if Path(model).expanduser().exists() else builtin_name(model)
    name = model if built_in is None else hub_id(values)
    if name is None or " with " in model:
        return Served(model, problem=f"no weights of {model} are known on the hub: give the folder of yours")
    problem = quantisation_problem(values)
    if problem is not None:
        return Served(name, problem=f"{name}: {problem}")
    method = (values.get("quantization_config") or {}).get("quant_method")
    as_stored = planned == WeightFormat.of(values, dtype)
    dequantised = method in _DEQUANTISED and planned == WeightFormat.named(dtype, dtype)
    if as_stored and method == "mxfp4":
        return Served(name, problem=f"MXFP4 weights are dequantised at load: plan with --weight-dtype {dtype}")
    if not (as_stored or dequantised):
        return Served(name, problem=f"the weights of {name} have another format: give a folder with the planned ones")
    return Served(name, "none" if dequantised and method == "fp8" else "")


def serve_command(model: Served, base: Deployment, one: Forecast, dtype: str, kv_dtype: str, tokens: int) -> str | None:
    """What starts a layout for requests of so many tokens; None where the planned weights cannot be served."""
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
    """What a user has to know before the command is run."""
    positions, ranks = base.model.max_position_embeddings, one.parallel.world_size
    notes = []
    if tokens > positions:
        notes.append(f"the model was made for {positions:,} positions, and `serve` takes no longer requests")
    if ranks > base.gpus_per_node:
        notes.append(
            f"the command is for the head of a Ray cluster of {-(-ranks // base.gpus_per_node)} machines, begun with "
            "`ray start --head --port 6379`"
        )
    return notes
