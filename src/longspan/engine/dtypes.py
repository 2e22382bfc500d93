"""The dtypes of weights, activations and cached rows, from what the user asks for and what the device multiplies.

It owns these decisions and their reasons; it must not know a model.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

from longspan.clock import repeated
from longspan.config import EngineConfig, require
from longspan.models.layers import multiplies_bf16, multiplies_bf16_tiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
_FP8_CAPABILITY = (8, 9)
_SIZE = 512  # rows and columns of the weight that is multiplied to see whether a dtype is emulated
_ROWS = 32  # of the other factor: enough that arithmetic counts, and not the memory that is read
_SLOWER = 1.2  # times the seconds of float32 from which on users are told


def model_dtype(config: EngineConfig, device_type: str) -> torch.dtype:
    """Dtype of weights and activations."""
    return DTYPES[choose_dtype(config.dtype, device_type)[0]]


def cache_dtype(config: EngineConfig, device_type: str) -> torch.dtype:
    """Dtype of the cache's rows."""
    return QUANTISED.get(config.cache.dtype, model_dtype(config, device_type))


def choose_dtype(wanted: str, device_type: str) -> tuple[str, str]:
    """(the name of the dtype of weights and activations, why). The reason is empty where nothing was chosen."""
    if wanted != "auto":
        return wanted, ""
    if device_type == "cuda":
        return "bfloat16", ""
    if multiplies_bf16_tiles():
        return "bfloat16", "this processor multiplies tiles of it; --dtype float32 is more exact"
    if multiplies_bf16():  # measured: see docs/LOG.md
        return "float32", "the kernels for it decode faster; --dtype bfloat16 takes half of the memory"
    return "float32", "this processor has no instructions that multiply bfloat16"


def emulation_note(dtype: torch.dtype, threads: int) -> str | None:
    """A warning if this processor is slower in `dtype` than in float32, by a measurement of some milliseconds."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bf16()):
        return None
    # in a thread of its own, as ranks are: OpenMP's threads belong to the thread that computes
    with ThreadPoolExecutor(1) as apart:
        slower = apart.submit(_times_float32, dtype, threads).result()
    name = str(dtype).removeprefix("torch.")
    if slower < _SLOWER:
        return None
    return (
        f"warning: this processor emulates {name}: a product of {_ROWS} rows takes {slower:.1f} times as long as in "
        "float32 (measured); use --dtype float32"
    )


@torch.inference_mode()
def _times_float32(dtype: torch.dtype, threads: int) -> float:
    """Seconds of a product in `dtype` divided by those in float32."""
    torch.set_num_threads(threads)
    best: list[float] = []
    for kind in (dtype, torch.float32):
        x, weight = torch.ones(_ROWS, _SIZE, dtype=kind), torch.ones(_SIZE, _SIZE, dtype=kind)
        best.append(min(repeated(lambda x=x, weight=weight: F.linear(x, weight), 4)))  # type: ignore[misc]
    return best[0] / best[1]


def gpu_generation(device_type: str) -> int:
    """Major number of the compute capability of this machine's first GPU; 0 if it is not to be used."""
    if device_type != "cuda":
        return 0
    from longspan.engine.nvml import capability

    return capability()[0]


def check_cache_dtype(config: EngineConfig, device_type: str) -> None:
    """Raise `ConfigError` if the GPU does not support the cache's dtype."""
    if device_type != "cuda":
        return
    from longspan.engine.nvml import capability

    require(
        QUANTISED.get(config.cache.dtype) != torch.float8_e4m3fn
        or capability() >= _FP8_CAPABILITY,
        "kv_cache_dtype", config.cache.dtype, "needs a GPU of compute capability 8.9 or more", "use int8",
    )  # fmt: skip
