"""Every attention backend by name: adding one is one file and one row here."""

from collections.abc import Mapping
from types import MappingProxyType

from longspan.attention.backends import cpu, dense, flash_attn, flashinfer, triton
from longspan.attention.backends.base import AttentionBackend

_BUILT_IN = (
    cpu.BACKEND,
    triton.BACKEND,
    dense.BACKEND,
    flashinfer.BACKEND,
    flash_attn.BACKEND,
)
BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType({backend.name: backend for backend in _BUILT_IN})
BACKEND_NAMES = ("auto", *BACKENDS)
"""What an option may say: the engine chooses, or one of them."""

__all__ = ["BACKENDS", "BACKEND_NAMES", "AttentionBackend"]
