"""Longspan: a long-context LLM engine in which the sequence is the sharded dimension."""

from typing import TYPE_CHECKING

from longspan.errors import (
    ConfigError,
    ContextOverflow,
    EngineError,
    LongspanError,
    ModelError,
    RequestError,
    WorkerDied,
)
from longspan.request import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from longspan.version import __version__ as __version__

if TYPE_CHECKING:
    from longspan.llm import LLM


__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "ContextOverflow",
    "EngineError",
    "FinishReason",
    "LongspanError",
    "ModelError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "WorkerDied",
]


def __getattr__(name: str) -> object:
    """`LLM` brings PyTorch with it, which takes seconds: it is imported when first used."""
    if name == "LLM":
        from longspan.llm import LLM

        return LLM
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")
