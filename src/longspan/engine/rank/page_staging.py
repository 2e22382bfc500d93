"""Copies of many pages at once between a pool on a GPU and page-locked memory, on a stream of their own.

It owns streams and their order; it must not know what becomes of the bytes. A step may overwrite pages that are being
saved, so its kernels wait for the pages to be gathered on the device, but not for the copy to the CPU. Pages that are
loaded are read by later steps only, so no kernel waits for them: whoever publishes them calls the function that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.host_copy import integers

_BLOCK_BYTES, _BLOCKS = 64 << 20, 2  # device memory of pages on their way
Wait = Callable[[], None]


class Mark(Protocol):
    """A point in the work of the stream for copies."""

    def synchronize(self) -> None:
        """Wait until the stream has come to it."""


class Streams(Protocol):
    """The stream of the steps, and one for copies."""

    def copying(self) -> AbstractContextManager[object]:
        """Within this context work runs on the stream for copies."""

    def copies_wait(self) -> None:
        """Later copies wait for what the steps' stream has been given so far."""

    def mark(self) -> Mark:
        """A mark after what the stream for copies has been given so far."""

    def steps_wait(self, mark: Mark) -> None:
        """Later work of steps waits for a mark."""

    def host(self, rows: int, size: int) -> Tensor:
        """Page-locked memory, uint8 [rows, size]."""


class CudaStreams:
    """See `Streams`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying(self) -> AbstractContextManager[object]:
        """See `Streams.copying`."""
        return torch.cuda.stream(self._copies)

    def copies_wait(self) -> None:
        """See `Streams.copies_wait`."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))

    def mark(self) -> Mark:
        """See `Streams.mark`."""
        mark: Mark = self._copies.record_event()
        return mark

    def steps_wait(self, mark: Mark) -> None:
        """See `Streams.steps_wait`."""
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark)

    def host(self, rows: int, size: int) -> Tensor:
        """See `Streams.host`."""
        return torch.empty(rows, size, dtype=torch.uint8, pin_memory=True)


@dataclass
class _Block:
    """Device memory of pages on their way."""

    # uint8 [pages, bytes]
    pages: Tensor
    # the end of the last copy that uses it; None if none has
    mark: Mark | None = None


class PageStaging:
    """The pages of a pool: `pages` are the layers' tensors uint8 [kv_factor, Hkv, pages, bytes of a page]."""

    def __init__(self, pages: Sequence[Tensor], streams: Streams, block_bytes: int = _BLOCK_BYTES) -> None:
        self._pages = pages
        self._streams = streams
        self._sizes = [page[:, :, 0].numel() for page in pages]
        self._rows = max(1, block_bytes // sum(self._sizes))
        device = pages[0].device
        shape = (self._rows, sum(self._sizes))
        self._blocks = cycle([_Block(torch.empty(shape, dtype=torch.uint8, device=device)) for _ in range(_BLOCKS)])

    def save(self, indices: Sequence[int]) -> tuple[Tensor, Wait]:
        """Start copying pages to the CPU: uint8 [pages, bytes], which are complete once the function has returned."""
        host = self._streams.host(len(indices), sum(self._sizes))
        for start, stop, used in self._in_blocks(len(indices)):
            if used.mark is not None:
                self._streams.steps_wait(used.mark)  # an earlier copy may still read the block
            block = used.pages[: stop - start]
            index = self._index(indices[start:stop])
            for page, part in self._parts(block):
                part.copy_(page.index_select(2, index).permute(2, 0, 1, 3).flatten(1))
            self._streams.copies_wait()
            with self._streams.copying():
                host[start:stop].copy_(block, non_blocking=True)
            used.mark = self._streams.mark()
        return host, self._streams.mark().synchronize

    def load(self, indices: Sequence[int], host: Tensor) -> Wait:
        """Start copying `host`, page-locked uint8 [pages, bytes], to pages. Returns the function that waits for it.

        Pages are written after the kernels of all steps that have been launched.
        """
        self._streams.copies_wait()
        with self._streams.copying():
            for start, stop, used in self._in_blocks(len(indices)):
                block = used.pages[: stop - start]
                block.copy_(host[start:stop], non_blocking=True)
                index = self._index(indices[start:stop])
                for page, part in self._parts(block):
                    rows = part.view(len(part), page.shape[0], page.shape[1], page.shape[3])
                    page.index_copy_(2, index, rows.permute(1, 2, 0, 3))
                used.mark = self._streams.mark()
        done = self._streams.mark()

        def wait() -> None:
            done.synchronize()
            del kept[:]

        kept = [host]  # until it has been copied
        return wait

    def _in_blocks(self, count: int) -> Iterator[tuple[int, int, _Block]]:
        """(first, stop, block) for each block of `count` pages."""
        for start in range(0, count, self._rows):
            yield start, min(start + self._rows, count), next(self._blocks)

    def _parts(self, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's tensor, and its bytes [pages, bytes of a page] in the block."""
        return zip(self._pages, torch.split(block, self._sizes, dim=1), strict=True)

    def _index(self, indices: Sequence[int]) -> Tensor:
        return integers(indices, self._pages[0].device)
