"""Copies between the slots of a rank's pool and blocks of bytes, while steps use other slots.

It owns the order of the bytes in a block; it must not know which requests the slots belong to. On a GPU copies run on a
stream of their own, after the kernels that had been launched when `mark` was last called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from longspan.attention.pool import KVPool
from longspan.cache.pages import Span
from longspan.plan.source import Extent

_FEW_SPANS = 4  # up to this many are written as slices, more through an index


class PoolAccess:
    """A rank's pool, which holds the KV heads [heads[0], heads[1]) of the model.

    A block of T tokens is uint8 [layers, kv_factor, heads, T, bytes of a row], flattened. A row has its values first,
    then its scales if the cache is quantised.
    """

    def __init__(self, pool: KVPool, heads: Extent, device: torch.device) -> None:
        self._pool = pool
        self._first_head = heads[0]
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._launched: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
        rows = next(iter(pool.layers.values()))
        self._kv_factor = rows.values.shape[0]
        # bytes of one token in one layer and head
        self.token_bytes = self._kv_factor * sum(part.shape[-1] for part in self._tensors(next(iter(pool.layers))))

    def mark(self) -> None:
        """Make later copies wait for the kernels that the calling thread has launched so far."""
        if self._launched is not None:
            self._launched.record()

    def read(self, layers: Extent, heads: Extent, spans: Sequence[Span]) -> Tensor:
        """The block of some slots: a new uint8 tensor [bytes] on the CPU."""
        shape = self._shape(heads, spans)
        with self._on_stream():
            whole = torch.empty(layers[1] - layers[0], *shape, dtype=torch.uint8, device=self._device)
            index = self._index(spans)
            for layer, out in zip(range(*layers), whole, strict=True):
                at = 0
                for part in self._heads(layer, heads):
                    rows = part[:, :, _slice(spans[0])] if len(spans) == 1 else part.index_select(2, index)
                    out[..., at : at + part.shape[-1]].copy_(rows)
                    at += part.shape[-1]
            if self._stream is not None:  # one copy for all layers
                whole = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=True).copy_(whole, non_blocking=True)
                self._stream.synchronize()
        return whole.view(-1)

    def write(self, layers: Extent, heads: Extent, spans: Sequence[Span], block: Tensor) -> None:
        """Write a block, uint8 [bytes] on the CPU, into slots. It is complete when this returns."""
        shape = self._shape(heads, spans)
        with self._on_stream():
            index = self._index(spans) if len(spans) > _FEW_SPANS else None
            if self._stream is not None:
                block = block.pin_memory().to(self._device, non_blocking=True)
            for layer, rows in zip(range(*layers), block.view(-1, *shape), strict=True):
                at = 0
                for part in self._heads(layer, heads):
                    own = rows[..., at : at + part.shape[-1]]
                    at += part.shape[-1]
                    if index is not None:
                        part.index_copy_(2, index, own)
                    else:
                        _write_spans(part, spans, own)
        if self._stream is not None:
            self._stream.synchronize()

    def _tensors(self, layer: int) -> Iterator[Tensor]:
        """A layer's values, then its scales if it has any, as uint8 [kv_factor, Hkv of this rank, S, bytes]."""
        rows = self._pool.layers[layer]
        yield rows.values.view(torch.uint8)
        if rows.scales is not None:
            yield rows.scales.view(torch.uint8)

    def _heads(self, layer: int, heads: Extent) -> list[Tensor]:
        """`_tensors` of some KV heads of the model: uint8 [kv_factor, heads, S, bytes]."""
        first = self._first_head
        return [part[:, heads[0] - first : heads[1] - first] for part in self._tensors(layer)]

    def _shape(self, heads: Extent, spans: Sequence[Span]) -> tuple[int, int, int, int]:
        """The shape of one layer of a block: [kv_factor, heads, T, bytes of a row]."""
        tokens = sum(span.length for span in spans)
        return self._kv_factor, heads[1] - heads[0], tokens, self.token_bytes // self._kv_factor

    def _index(self, spans: Sequence[Span]) -> Tensor:
        """The slots of some spans, int64 [T] on the device."""
        slots = [slot for span in spans for slot in range(span.slot, span.slot + span.length)]
        index = torch.tensor(slots)
        return index if self._stream is None else index.pin_memory().to(self._device, non_blocking=True)

    def _on_stream(self) -> AbstractContextManager[object]:
        """Run copies on the stream of their own, after the last `mark`."""
        if self._stream is None or self._launched is None:
            return nullcontext()
        self._stream.wait_event(self._launched)
        return torch.cuda.stream(self._stream)


def _write_spans(part: Tensor, spans: Sequence[Span], rows: Tensor) -> None:
    """Copy `rows` [kv_factor, heads, T, bytes] into the slots of `part` [kv_factor, heads, S, bytes]."""
    at = 0
    for span in spans:
        part[:, :, _slice(span)].copy_(rows[:, :, at : at + span.length])
        at += span.length


def _slice(span: Span) -> slice:
    return slice(span.slot, span.slot + span.length)
