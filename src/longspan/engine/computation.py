"""How a model is computed, decided once by the driver: in which dtype, and on a CPU with which kernels and products.

It owns the order of these decisions and their lines for people; it must not know how anything is computed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from longspan.compiled.folder import KeptFiles
from longspan.compiled.library import begin_to_open, problem_of_kernels
from longspan.config import EngineConfig
from longspan.engine.cores import threads_per_rank
from longspan.engine.dtypes import choose_dtype, emulation_note, model_dtype
from longspan.engine.measured_products import Products, choose_products
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig
from longspan.models.registry import Family
from longspan.models.shapes import requests_of
from longspan.weights.source import ModelSource


def decide_computation(
    config: EngineConfig, source: ModelSource, family: Family, model: ModelConfig, device_type: str
) -> EngineConfig:
    """The configuration with dtype, kernels and the form of products decided, and the reasons as lines for people."""
    dtype, threads = model_dtype(config, device_type), threads_per_rank(config)
    notes: list[str] = []
    if device_type == "cpu":
        chosen, why = choose_dtype(config.dtype, device_type)
        emulated = emulation_note(dtype, threads)
        notes += [f"dtype: {chosen} ({why})"] if why else []
        notes += [emulated] if emulated else []
        config = replace(config, dtype=chosen)
    kernels, line = choose_kernels(config.cpu_kernels, device_type, dtype)
    notes += [line] if line else []
    config = replace(config, cpu_kernels=kernels)

    def products() -> Products:
        asked = requests_of(lambda context: family.build(model, context, dtype)).matrices
        params = tuple(param for request in asked for param in request if param.axes[0] != "vocab")
        return Products(params, dtype, threads, source.checkpoint)

    found = choose_products(config.quantization, device_type, products, kernels == "compiled", KeptFiles.of_user())
    return replace(config, products=replace(found, notes=(*notes, *found.notes)))


def prepare_kernels(config: EngineConfig, device_type: str) -> None:
    """Begin to open kernels that may be used: compiling them takes seconds, in which a start can do other things."""
    if device_type == "cpu" and config.cpu_kernels != "plain" and model_dtype(config, device_type) == torch.float32:
        begin_to_open()


def choose_kernels(wanted: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """(`compiled` or `plain`, a line for people or nothing). Raises `ConfigError` where `compiled` is impossible."""
    problem: str | None = None
    if wanted == "plain":
        return "plain", ""
    if device_type != "cpu" or dtype != torch.float32:
        problem = f"they compute in float32 on a CPU, not in {dtype} on {device_type}".replace("torch.", "")
        if wanted == "auto":
            return "plain", ""
    problem = problem or problem_of_kernels()
    if problem is None:
        return "compiled", ""
    if wanted == "compiled":
        raise ConfigError("cpu_kernels", wanted, problem, "use auto or plain")
    return "plain", f"kernels: PyTorch's ({problem}); with compiled ones a CPU takes less time"
