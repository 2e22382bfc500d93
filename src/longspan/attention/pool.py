"""The KV pool of one rank: the tensors behind the pages.

It owns storage, writing and reading of slots; it must not know which request a slot belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longspan.cache.layout import KVLayout
from longspan.cache.pages import Span
from longspan.view import WriteRun

_FEW_RUNS = 4  # up to this many runs are written as slices, more through an index


class SlotWriter:
    """Where a step's rows go, prepared once and used by every layer."""

    def __init__(self, writes: Sequence[WriteRun], rows: int) -> None:
        self._runs = writes if len(writes) <= _FEW_RUNS else ()
        self._slots: Tensor | None = None
        self._rows: Tensor | None = None
        if not self._runs and writes:
            index = [row for run in writes for row in range(run.row, run.row + run.length)]
            self._rows = torch.tensor(index) if len(index) < rows else None
            slots = [slot for run in writes for slot in range(run.slot, run.slot + run.length)]
            self._slots = torch.tensor(slots)

    def write(self, pool: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows of k, v [T, Hkv, D] into pool [planes, Hkv, slots, D]; a pool of one plane takes k alone."""
        for part, rows in zip(pool, (k, v), strict=False):
            by_head = rows.transpose(0, 1)
            for run in self._runs:
                part[:, run.slot : run.slot + run.length] = by_head[:, run.row : run.row + run.length]
            if self._slots is not None:
                chosen = by_head if self._rows is None else by_head[:, self._rows]
                part.index_copy_(1, self._slots, chosen)


def read_spans(pool: Tensor, spans: Sequence[Span]) -> Tensor:
    """The slots of `spans`, one behind the other: [planes, Hkv, tokens, D]."""
    if not spans:
        return pool[:, :, :0]
    return torch.cat([pool[:, :, span.slot : span.slot + span.length] for span in spans], dim=2)


class KVPool:
    """Keys and values of the layers held here; memory is touched only when a page is first written."""

    def __init__(
        self, layout: KVLayout, layers: Iterable[int], num_pages: int, page_size: int, dtype: torch.dtype
    ) -> None:
        shape = layout.pool_shape(num_pages, page_size)
        self.layers = {layer: torch.empty(shape, dtype=dtype) for layer in layers}
