"""What all backends of plain tensor operations share: writing to slots and merging states.

It owns these two operations; attention itself is implemented by each backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longspan.attention.backends.base import Backend
from longspan.attention.pool import SlotWriter
from longspan.attention.state import AttentionState, merge
from longspan.plan.view import WriteRun


class PlainBackend(Backend):
    """A `Backend` without attention, on any device."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._device = device

    def writer(self, writes: Sequence[WriteRun], rows: int) -> SlotWriter:
        """See `Backend.writer`."""
        return SlotWriter(writes, rows, self._device)

    def merge(self, parts: Sequence[AttentionState]) -> AttentionState:
        """See `Backend.merge`."""
        return merge(parts)
