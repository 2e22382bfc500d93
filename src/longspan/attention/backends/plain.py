"""What backends of plain tensor operations have in common: writing slots and merging states.

It owns these two; how queries meet keys is each backend's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longspan.attention.backends.base import Backend
from longspan.attention.pool import SlotWriter
from longspan.attention.state import AttentionState, merge
from longspan.plan.view import WriteRun


class PlainBackend(Backend):
    """All of a `Backend` but attention, on any device."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._device = device

    def writer(self, writes: Sequence[WriteRun], rows: int) -> SlotWriter:
        """See `Backend.writer`."""
        return SlotWriter(writes, rows, self._device)

    def merge(self, parts: Sequence[AttentionState]) -> AttentionState:
        """See `Backend.merge`."""
        return merge(parts)
