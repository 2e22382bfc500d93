"""The table of built-in attention backends. To add one, add a file and a row to `_BUILT_IN`."""

from collections.abc import Mapping
from types import MappingProxyType

from longspan.attention.backends import compiled, cpu, cudnn, dense, flash_attn, flashinfer, triton
from longspan.attention.backends.base import AttentionBackend

_BUILT_IN = (
    compiled.BACKEND,
    cpu.BACKEND,
    cudnn.BACKEND,
    triton.BACKEND,
    dense.BACKEND,
    flashinfer.BACKEND,
    flash_attn.BACKEND,
)
BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType({backend.name: backend for backend in _BUILT_IN})
BACKEND_NAMES = ("auto", *BACKENDS)
"""The values of the option: `auto` lets the engine choose."""

__all__ = ["BACKENDS", "BACKEND_NAMES", "AttentionBackend"]
