"""The Triton kernels' record; what imports Triton is imported when a backend is built."""

from __future__ import annotations

import torch

from longspan.attention.backends.base import AttentionBackend, Backend, BackendShape

_WIDEST = 256  # elements of a head: of keys and values wider than this no two tiles fit shared memory
_WIDEST_LATENT = 576  # MLA's latent and its rope part: one tile is keys and values


def _supports(shape: BackendShape) -> str | None:
    if shape.head_dim <= (_WIDEST_LATENT if shape.kv_factor == 1 else _WIDEST):
        return None
    return f"takes heads of up to {_WIDEST} elements and latents of up to {_WIDEST_LATENT}, not {shape.head_dim}"


def _build(device: torch.device, shape: BackendShape) -> Backend:
    from longspan.attention.backends.triton.backend import TritonBackend

    return TritonBackend(device, shape.value_dim)


BACKEND = AttentionBackend("triton", devices=("cuda",), supports=_supports, build=_build, package="triton")
