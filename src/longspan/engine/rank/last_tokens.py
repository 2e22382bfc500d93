"""The tokens that a rank sampled in its last step, from which the next one begins before the driver has read them.

It owns these tokens on the device, and which request each is of; a plan says which rows take one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from longspan.attention.host_copy import integers, to_device
from longspan.plan.decode import DecodePending
from longspan.plan.view import RankView


class LastTokens:
    """The tokens of one step; none at first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens = torch.empty(0, dtype=torch.int64, device=device)  # [rows]
        self._rows: dict[str, int] = {}  # of each request its row in them

    def forget(self) -> None:
        """No token is pending from now on."""
        self._rows = {}

    def keep(self, tokens: Tensor, names: Iterable[str]) -> None:
        """Keep the tokens int64 [rows] of a step, in the order of its requests."""
        self._tokens = tokens
        self._rows = {name: number for number, name in enumerate(names)}

    def fill(self, view: RankView) -> Tensor:
        """Token ids int64 [T] of a step's rows, with those that are pending."""
        pending = view.pending
        if not pending:
            return integers(view.token_ids, self._device)
        if isinstance(pending, DecodePending):
            rows, names = list(pending.rows), pending.names
        else:
            rows, names = [one.row for one in pending], [one.request_id for one in pending]
        sources, kept = [self._rows[name] for name in names], len(self._tokens)
        if len(sources) == len(view.token_ids) == kept and sources == list(range(kept)):
            return self._tokens  # the same requests as in the step before
        # of each row its place in the tokens of the step before and, behind them, those of the plan
        places, count = np.arange(kept, kept + len(view.token_ids)), len(view.token_ids)
        places[rows] = sources
        sent = to_device(torch.from_numpy(np.concatenate((places, view.token_ids))), self._device)
        return torch.cat((self._tokens, sent[count:])).index_select(0, sent[:count])
