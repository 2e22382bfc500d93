"""Short contexts of many lone queries as one padded batch, so that a step of many small requests is one kernel call.

It owns which queries share a batch and the index of what they see; it must not know what is computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.plan.reach import QueryRun

_MAX_TOKENS = 512  # of one query's context: longer ones are attended in place, which copies nothing
_MAX_COPIED = 8192  # slots of one batch: more of them leave the cache
_MIN_QUERIES = 3


@dataclass(frozen=True, eq=False)
class Batch:
    """Queries of one token each: their `rows` [B]; the `slots` [B, L] each sees, padded with its own last one; and
    `seen`, bool [B, L]: those that are no padding."""

    rows: Tensor
    slots: Tensor
    seen: Tensor


def batches(runs: Sequence[QueryRun]) -> tuple[tuple[Batch, ...], tuple[QueryRun, ...]]:
    """Runs that are worth a batch, and the others."""
    short = [run for run in runs if run.length == 1 and run.window_starts is None and 0 < run.tokens <= _MAX_TOKENS]
    short.sort(key=lambda run: -run.tokens)
    groups: list[list[QueryRun]] = []
    for run in short:
        longest = groups[-1][0].tokens if groups else 0
        if longest > 2 * run.tokens or not groups or longest * (len(groups[-1]) + 1) > _MAX_COPIED:
            groups.append([])
        groups[-1].append(run)
    kept = [group for group in groups if len(group) >= _MIN_QUERIES]
    batched = {run.row for group in kept for run in group}
    return tuple(map(_batch, kept)), tuple(run for run in runs if run.row not in batched)


def _batch(runs: Sequence[QueryRun]) -> Batch:
    longest = runs[0].tokens
    slots = torch.empty(len(runs), longest, dtype=torch.int64)
    for row, run in zip(slots, runs, strict=True):
        at = 0
        for span in run.spans:
            torch.arange(span.slot, span.slot + span.length, out=row[at : at + span.length])
            at += span.length
        row[at:] = row[at - 1]
    lengths = torch.tensor([run.tokens for run in runs])
    return Batch(torch.tensor([run.row for run in runs]), slots, torch.arange(longest) < lengths[:, None])
