"""Memory and compute capability of a GPU from its driver's library, without a CUDA context.

A context takes some hundred megabytes of a GPU for as long as its process lives, and the driver's process computes
nothing. It owns these two questions; where the library is missing PyTorch answers them, with a context.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p

import torch

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(Structure):
    """`nvmlMemory_t`."""

    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


def free_bytes(library: str = _LIBRARY) -> int:
    """Free bytes of the first GPU that this process may use."""
    try:
        with _first_gpu(library) as (nvml, gpu):
            memory = _Memory()
            _check(nvml.nvmlDeviceGetMemoryInfo(gpu, byref(memory)))
            return int(memory.free)
    except OSError:
        return torch.cuda.mem_get_info()[0]


def capability(library: str = _LIBRARY) -> tuple[int, int]:
    """Compute capability (major, minor) of the first GPU that this process may use."""
    try:
        with _first_gpu(library) as (nvml, gpu):
            major, minor = c_int(), c_int()
            _check(nvml.nvmlDeviceGetCudaComputeCapability(gpu, byref(major), byref(minor)))
            return major.value, minor.value
    except OSError:
        return torch.cuda.get_device_capability()


@contextmanager
def _first_gpu(library: str) -> Iterator[tuple[CDLL, c_void_p]]:
    """The library and the handle of a GPU. Raises `OSError` if there is no library, or it cannot tell."""
    nvml = CDLL(library)
    _check(nvml.nvmlInit_v2())
    try:
        gpu = c_void_p()
        name = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        if name.isdecimal():
            nvml.nvmlDeviceGetHandleByIndex_v2.argtypes = [c_uint, POINTER(c_void_p)]
            _check(nvml.nvmlDeviceGetHandleByIndex_v2(int(name), byref(gpu)))
        else:
            nvml.nvmlDeviceGetHandleByUUID.argtypes = [c_char_p, POINTER(c_void_p)]
            _check(nvml.nvmlDeviceGetHandleByUUID(name.encode(), byref(gpu)))
        yield nvml, gpu
    finally:
        nvml.nvmlShutdown()


def _check(status: int) -> None:
    if status:
        raise OSError(f"NVML answers with status {status}")
