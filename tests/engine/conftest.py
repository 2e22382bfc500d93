"""Engines on tiny models: every test names what it varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from longspan import LLM
from longspan.config import CostConstants
from tests.oracle import tiny_folder

DEFAULTS: dict[str, Any] = {
    "page_size": 4,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
    "local_context": 8,
    "kv_cache_memory_bytes": 1 << 20,
    "num_threads": 1,
    "debug": True,
    "dtype": "float32",
    "cost": CostConstants(),
}
THREADS = {**DEFAULTS, "executor": "threads"}  # tests look into ranks, and a machine may have one GPU only
SHORT = {
    "tp": "tensor_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "dcp": "decode_context_parallel_size",
    "pp": "pipeline_parallel_size",
}


@pytest.fixture
def engines() -> Any:
    """`engines(folder, tp=2, pcp=2, page_size=16, ...)` starts an engine; all are shut down after the test."""
    started: list[LLM] = []

    def start(folder: str, **options: Any) -> LLM:
        named = {SHORT.get(name, name): value for name, value in options.items()}
        started.append(LLM(folder, **{**THREADS, **named}))
        return started[-1]

    yield start
    for llm in started:
        llm.shutdown()


@pytest.fixture
def tiny(engines: Any) -> Any:
    """`tiny("llama", tp=2, ...)` starts an engine on a tiny model, a Llama by default."""
    return lambda model="llama", **options: engines(tiny_folder(model), **options)


Start = Callable[..., LLM]
