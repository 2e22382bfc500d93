"""Copies from the host that do not wait for the device.

It owns pinned memory for them: a copy from ordinary memory would wait for the step that the device is computing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which `device` copies without waiting: pinned for CUDA, any other as it is.

    The allocator keeps pinned memory until the copy is done, so the tensor may be overwritten at once.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, in the order of the current stream."""
    return tensor if device.type == "cpu" else pinned(tensor, device).to(device, non_blocking=True)


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """The values as int64 [n] on `device`, in the order of the current stream."""
    # through an array: PyTorch takes three times as long to read a list
    return to_device(torch.from_numpy(np.array(values, dtype=np.int64)), device)


def copy_to(target: Tensor, source: Tensor) -> None:
    """Copy from the host to `target`, of the same shape, in the order of the current stream."""
    target.copy_(pinned(source, target.device), non_blocking=True)
