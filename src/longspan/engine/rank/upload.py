"""Copies of weights to a GPU: blocks are read by several threads into page-locked memory, and copied meanwhile.

It owns the buffers and their order; it must not know where the bytes come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

_BUFFERS, _BUFFER_BYTES = 4, 32 << 20
Write = Callable[[int, int, Tensor], None]
"""(start, stop, out): writes rows [start, stop) to `out` on the CPU."""


class Copying(Protocol):
    """How blocks reach the device."""

    def buffer(self, size: int) -> Tensor:
        """A buffer uint8 [size] on the CPU."""

    def start(self, target: Tensor, block: Tensor) -> Callable[[], None]:
        """Start copying a block to the device; the returned function waits for the end of the copy."""


class CudaCopying:
    """See `Copying`."""

    def buffer(self, size: int) -> Tensor:
        """See `Copying.buffer`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, target: Tensor, block: Tensor) -> Callable[[], None]:
        """See `Copying.start`."""
        target.copy_(block, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return done.synchronize


class Upload:
    """Fills tensors on a device. One tensor is filled at a time."""

    def __init__(self, copying: Copying, buffers: int = _BUFFERS, size: int = _BUFFER_BYTES) -> None:
        self._copying = copying
        self._count = buffers
        self._size = size
        # buffers that may be in use, the oldest first, each with the function that waits for its last copy
        self._buffers: deque[tuple[Tensor, Callable[[], None]]] = deque()

    def fill(self, target: Tensor, write: Write) -> None:
        """Fill `target` [rows, ...] with what `write` gives. Several threads call `write`, for different rows."""
        if not target.numel():
            return
        row = target[0].numel() * target.element_size()
        rows = max(1, self._size // row)
        self._reserve(max(self._size, row))
        reading: deque[tuple[Tensor, Tensor, Tensor, Future[None]]] = deque()
        with ThreadPoolExecutor(self._count) as threads:
            for start in range(0, len(target), rows):
                if not self._buffers:  # all are being read into
                    self._send(*reading.popleft())
                buffer, arrived = self._buffers.popleft()
                arrived()
                part = target[start : start + rows]
                block = buffer[: len(part) * row].view(target.dtype).view(part.shape)
                job = threads.submit(write, start, start + len(part), block)
                reading.append((part, block, buffer, job))
            while reading:
                self._send(*reading.popleft())

    def _send(self, part: Tensor, block: Tensor, buffer: Tensor, job: Future[None]) -> None:
        """Wait until a block has been read, and start its copy."""
        job.result()
        self._buffers.append((buffer, self._copying.start(part, block)))

    def _reserve(self, size: int) -> None:
        """Have all buffers, of at least `size` bytes."""
        if len(self._buffers) == self._count and len(self._buffers[0][0]) >= size:
            return
        for _, arrived in self._buffers:
            arrived()
        self._buffers = deque((self._copying.buffer(size), _at_once) for _ in range(self._count))


def _at_once() -> None:
    """Nothing to wait for."""
