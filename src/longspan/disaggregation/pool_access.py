"""Slots of a rank's pool as bytes, read and written beside the steps that use other slots.

It owns the order of these bytes; it must not know whose slots they are. On a GPU copies have a stream of their own,
behind what was launched when `mark` was last called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from longspan.attention.pool import KVPool
from longspan.cache.pages import Span
from longspan.plan.source import Extent

_FEW_SPANS = 4  # up to this many are copied as slices, more through an index


class PoolAccess:
    """A rank's pool, whose KV heads are [heads[0], heads[1]) of the model's.

    A block is, for each layer, [kv_factor, heads, tokens, bytes of a row]: values, then scales if rows have any.
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
        self._planes = rows.values.shape[0]
        self.token_bytes = self._planes * sum(part.shape[-1] for part in self._tensors(next(iter(pool.layers))))
        """Bytes of one token in one layer and head."""

    def mark(self) -> None:
        """Copies from now on come behind what this thread has launched."""
        if self._launched is not None:
            self._launched.record()

    def read(self, layers: Extent, heads: Extent, spans: Sequence[Span]) -> Tensor:
        """The block of some slots: uint8 on the CPU, the caller's own."""
        shape = self._shape(heads, spans)
        with self._copying():
            whole = torch.empty(layers[1] - layers[0], *shape, dtype=torch.uint8)
            index = self._index(spans)
            for layer, out in zip(range(*layers), whole, strict=True):
                at = 0
                for part in self._heads(layer, heads):
                    rows = part[:, :, _slice(spans[0])] if len(spans) == 1 else part.index_select(2, index)
                    out[..., at : at + part.shape[-1]].copy_(rows)
                    at += part.shape[-1]
        return whole.view(-1)

    def write(self, layers: Extent, heads: Extent, spans: Sequence[Span], block: Tensor) -> None:
        """Put a block into slots; it is there when this returns."""
        shape = self._shape(heads, spans)
        with self._copying():
            index = self._index(spans) if len(spans) > _FEW_SPANS else None
            for layer, rows in zip(range(*layers), block.view(-1, *shape), strict=True):
                at = 0
                for part in self._heads(layer, heads):
                    own = rows[..., at : at + part.shape[-1]]
                    at += part.shape[-1]
                    if index is not None:
                        part.index_copy_(2, index, own.to(part.device))
                    else:
                        _put(part, spans, own)
        if self._stream is not None:
            self._stream.synchronize()

    def _tensors(self, layer: int) -> Iterator[Tensor]:
        """A layer's tensors as bytes [kv_factor, heads, slots, bytes]."""
        rows = self._pool.layers[layer]
        yield rows.values.view(torch.uint8)
        if rows.scales is not None:
            yield rows.scales.view(torch.uint8)

    def _heads(self, layer: int, heads: Extent) -> list[Tensor]:
        first = self._first_head
        return [part[:, heads[0] - first : heads[1] - first] for part in self._tensors(layer)]

    def _shape(self, heads: Extent, spans: Sequence[Span]) -> tuple[int, int, int, int]:
        tokens = sum(span.length for span in spans)
        return self._planes, heads[1] - heads[0], tokens, self.token_bytes // self._planes

    def _index(self, spans: Sequence[Span]) -> Tensor:
        slots = [slot for span in spans for slot in range(span.slot, span.slot + span.length)]
        return torch.tensor(slots, device=self._device)

    def _copying(self) -> AbstractContextManager[object]:
        if self._stream is None or self._launched is None:
            return nullcontext()
        self._stream.wait_event(self._launched)
        return torch.cuda.stream(self._stream)


def _put(part: Tensor, spans: Sequence[Span], rows: Tensor) -> None:
    at = 0
    for span in spans:
        part[:, :, _slice(span)].copy_(rows[:, :, at : at + span.length])
        at += span.length


def _slice(span: Span) -> slice:
    return slice(span.slot, span.slot + span.length)
