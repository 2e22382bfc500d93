"""What sampling sends to a device in one copy, and what it reads back, without waiting for the device.

It owns the pinned memory that is read into; copies to the device are those of `host_copy.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from longspan.attention.host_copy import to_device


class OneCopy:
    """Integers and floats of many uses that go to a device in one copy."""

    def __init__(self) -> None:
        self._values = array("q")
        self._lengths: list[int] = []

    def integers(self, values: Iterable[int]) -> int:
        """Add integers; returns the number of their tensor, int64, in what `send` returns."""
        before = len(self._values)
        self._values.extend(values)
        self._lengths.append(len(self._values) - before)
        return len(self._lengths) - 1

    def floats(self, values: Iterable[float]) -> int:
        """Add floats as integers of the same 64 bits. `Tensor.view(torch.float64)` makes them floats again."""
        return self.integers(float_bits(values))

    def send(self, device: torch.device) -> Sequence[Tensor]:
        """Start the copy; returns the tensors."""
        if not self._values:
            return [torch.empty(0, dtype=torch.int64, device=device) for _ in self._lengths]
        return torch.split(to_device(torch.frombuffer(self._values, dtype=torch.int64), device), self._lengths)


def float_bits(values: Iterable[float]) -> Iterable[int]:
    """The bits of fp64 numbers as integers."""
    return memoryview(array("d", values)).cast("B").cast("q")


def start_reading(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start the copy of tensors, of any shape, to the host; the returned function waits for it.

    The copy is queued on the current stream now, so it does not wait for kernels that are launched later.
    """
    if tensors[0].device.type == "cpu":
        return lambda: list(tensors)
    parts = [tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors]
    arrived = _read(parts[0] if len(parts) == 1 else torch.cat(parts))
    ends = list(accumulate(part.numel() for part in parts))

    def finish() -> list[Tensor]:
        data = arrived()
        return [
            # cloned, because a view as a wider type must begin at a multiple of its size
            data[end - part.numel() : end].clone().view(tensor.dtype).reshape(tensor.shape)
            for end, part, tensor in zip(ends, parts, tensors, strict=True)
        ]

    return finish


def _read(data: Tensor) -> Callable[[], Tensor]:
    """Start one copy of `data` to pinned memory; the returned function waits for it."""
    copy = torch.empty_like(data, device="cpu", pin_memory=True).copy_(data, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def arrived() -> Tensor:
        done.synchronize()
        return copy

    return arrived
