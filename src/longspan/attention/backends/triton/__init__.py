"""The record of the Triton backend. It owns what the kernels support; Triton is imported when a backend is built."""

from __future__ import annotations

import torch

from longspan.attention.backends.base import AttentionBackend, Backend, BackendShape

_WIDEST = 256  # most elements of a head: wider tiles of keys and of values do not both fit into shared memory
_WIDEST_LATENT = 576  # most elements of latent and rotary key: here one tile holds keys and values


def _supports(shape: BackendShape) -> str | None:
    """See `AttentionBackend.supports`."""
    if shape.quantised and shape.kv_factor == 1 and shape.value_dim & (shape.value_dim - 1):
        return f"reads quantised latents whose rank is a power of two, not {shape.value_dim}"
    if shape.head_dim <= (_WIDEST_LATENT if shape.kv_factor == 1 else _WIDEST):
        return None
    return f"takes heads of up to {_WIDEST} elements and latents of up to {_WIDEST_LATENT}, not {shape.head_dim}"


def _build(device: torch.device, shape: BackendShape) -> Backend:
    from longspan.attention.backends.triton.backend import TritonBackend

    return TritonBackend(device, shape.value_dim)


def _detail(shape: BackendShape) -> str | None:
    """See `AttentionBackend.detail`."""
    from longspan.attention.backends.triton.hopper import kernel_of_latents

    return kernel_of_latents(shape)


BACKEND = AttentionBackend(
    "triton", devices=("cuda",), supports=_supports, build=_build, package="triton", detail=_detail, device_slots=True
)
