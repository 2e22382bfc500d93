"""Integers at fixed addresses on the device, which are filled on the host and sent together.

It owns the memory and the copies; it must not know what the integers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.attention.host_copy import copy_to

_CHUNK = 16384  # int32 of a chunk: enough for a step of some hundred rows
_ALIGNED = 4  # int32 in 16 bytes: Triton compiles a kernel again for pointers that are not aligned to 16 bytes


@dataclass(frozen=True)
class Field:
    """Adjacent integers of a buffer."""

    # what will be sent, int32 or int64 [count]
    host: NDArray[Any]
    # where it arrives, at a fixed address
    device: Tensor

    def send(self) -> None:
        """Send these integers alone, in the order of the current stream."""
        _send(self.device, torch.from_numpy(self.host))


class StepBuffer:
    """What a decode step sends to its device, with one copy for each chunk: most steps have one.

    On a CPU host and device are the same memory, and nothing is sent.
    """

    def __init__(self, device: torch.device, chunk: int = _CHUNK) -> None:
        self._device = device
        self._chunk = chunk  # int32 of a chunk, at least
        self._chunks: list[tuple[Tensor, Tensor]] = []  # int32, on the host and on the device
        self._used: list[int] = []  # of each chunk

    def reserve(self, count: int, dtype: torch.dtype = torch.int32) -> Field:
        """A field of `count` zeros."""
        size = count * dtype.itemsize // torch.int32.itemsize
        if not self._chunks or self._used[-1] + size > len(self._chunks[-1][0]):
            host = torch.zeros(max(size, self._chunk), dtype=torch.int32)
            on_cpu = self._device.type == "cpu"
            self._chunks.append((host, host if on_cpu else torch.zeros_like(host, device=self._device)))
            self._used.append(0)
        at = self._used[-1]
        self._used[-1] = -(-(at + size) // _ALIGNED) * _ALIGNED
        host, device = (part[at : at + size].view(dtype) for part in self._chunks[-1])
        return Field(host.numpy(), device)

    def send(self) -> None:
        """Send all fields, in the order of the current stream."""
        for (host, device), used in zip(self._chunks, self._used, strict=True):
            _send(device[:used], host[:used])


def _send(target: Tensor, source: Tensor) -> None:
    if target.device.type != "cpu":
        copy_to(target, source)
