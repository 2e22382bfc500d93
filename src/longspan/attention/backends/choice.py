"""Which attention backend a rank uses: what is installed, on which device, for which shape of cache.

It owns the names and what each of them can serve; it must not know how one works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from longspan.attention.backends.base import Backend
from longspan.errors import ConfigError

BACKEND_NAMES = ("auto", "cpu", "torch", "triton", "flashinfer", "flash_attn")
_LIBRARIES = ("triton", "flashinfer", "flash_attn")  # backends named like the packages they need
_HALF = (torch.bfloat16, torch.float16)
_TRITON_WIDEST = 256  # elements of a head: of keys and values wider than this no two tiles fit shared memory
_TRITON_WIDEST_LATENT = 576  # MLA's latent and its rope part: one tile is keys and values
_FLASHINFER_DIMS = (64, 128, 256)
_FLASHINFER_LATENT = (576, 512)
_FLASH_ATTN_WIDEST = 256


@dataclass(frozen=True)
class BackendShape:
    """What a model asks of a backend: rows of `head_dim` elements, of which attention returns the first `value_dim`.

    `planes` is 2 for keys and values, 1 for latents; `dtype` is the queries'.
    """

    head_dim: int
    value_dim: int
    planes: int
    quantised: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Choice:
    """A backend's name, never `auto`, and why it is the one."""

    name: str
    reason: str


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def choose_backend(
    requested: str, device_type: str, shape: BackendShape, is_installed: Callable[[str], bool] = _is_installed
) -> Choice:
    """The backend for a device and a shape. Raises `ConfigError` if the one asked for cannot be used."""
    if requested not in BACKEND_NAMES:
        raise ConfigError("attention_backend", requested, "is unknown", f"choose one of {', '.join(BACKEND_NAMES)}")
    if requested != "auto":
        problem = _problem(requested, device_type, shape, is_installed)
        if problem:
            raise ConfigError("attention_backend", requested, problem, "give another one, or auto")
        return Choice(requested, "asked for")
    if device_type == "cpu":
        return Choice("cpu", "the device is a CPU")
    problem = _problem("triton", device_type, shape, is_installed)
    return Choice("torch", f"triton {problem}") if problem else Choice("triton", "serves this model on this device")


def build_backend(choice: Choice, device: torch.device, value_dim: int) -> Backend:
    """The backend itself; its module, and the library behind it, are imported only now."""
    if choice.name == "cpu":
        from longspan.attention.backends.cpu import CpuBackend

        return CpuBackend()
    if choice.name == "triton":
        from longspan.attention.backends.triton.backend import TritonBackend

        return TritonBackend(device, value_dim)
    if choice.name == "flashinfer":
        from longspan.attention.backends.flashinfer import FlashInferBackend

        return FlashInferBackend(device)
    if choice.name == "flash_attn":
        from longspan.attention.backends.flash_attn import FlashAttnBackend

        return FlashAttnBackend(device)
    from longspan.attention.backends.dense import TorchBackend

    return TorchBackend(device)


def _problem(name: str, device_type: str, shape: BackendShape, is_installed: Callable[[str], bool]) -> str | None:
    """Why a backend cannot be used; None if it can."""
    if name == "torch":
        return None
    device = "cpu" if name == "cpu" else "cuda"
    if device_type != device:
        return f"needs a {device} device, not {device_type}"
    if name in _LIBRARIES and not is_installed(name):
        return f"needs the package {name}, which is not installed"
    if name == "triton":
        return _triton_problem(shape)
    if name in ("flashinfer", "flash_attn"):
        if shape.quantised:
            return "cannot read a cache with a scale for each row"
        if shape.dtype not in _HALF:
            return f"computes in bfloat16 or float16, not {str(shape.dtype).removeprefix('torch.')}"
        return _flashinfer_problem(shape) if name == "flashinfer" else _flash_attn_problem(shape)
    return None


def _triton_problem(shape: BackendShape) -> str | None:
    if shape.head_dim <= (_TRITON_WIDEST_LATENT if shape.planes == 1 else _TRITON_WIDEST):
        return None
    return (
        f"takes heads of up to {_TRITON_WIDEST} elements and latents of up to {_TRITON_WIDEST_LATENT}, "
        f"not {shape.head_dim}"
    )


def _flashinfer_problem(shape: BackendShape) -> str | None:
    if shape.planes == 1:
        rows, values = _FLASHINFER_LATENT
        fits = (shape.head_dim, shape.value_dim) == _FLASHINFER_LATENT
        return None if fits else f"takes latents of {rows} elements with {values} of values"
    if shape.head_dim not in _FLASHINFER_DIMS:
        return f"takes heads of {', '.join(map(str, _FLASHINFER_DIMS))} elements, not {shape.head_dim}"
    return None


def _flash_attn_problem(shape: BackendShape) -> str | None:
    if shape.planes == 1:
        return "cannot read a cache of latents"
    if shape.head_dim > _FLASH_ATTN_WIDEST or shape.head_dim % 8:
        return f"takes heads of up to {_FLASH_ATTN_WIDEST} elements, a multiple of 8, not {shape.head_dim}"
    return None
