"""Batching of single queries over short contexts, so that a step of many small requests is one kernel call.

It owns which queries share a batch, and the index of the slots that they see; it must not know what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.plan.reach import QueryRun

_MAX_TOKENS = 512  # longest context in a batch; longer ones are attended in place, without a copy
_MAX_COPIED = 8192  # most slots that a batch copies; more do not fit into the processor's cache
_MIN_QUERIES = 3  # fewer queries are not batched


@dataclass(frozen=True, eq=False)
class Batch:
    """B queries of one token each, whose contexts are padded to L tokens."""

    # [B] int64: rows of the queries
    rows: Tensor
    # [B, L] int64: the slots that each query sees, padded with its last slot
    slots: Tensor
    # [B, L] bool: False for padding
    seen: Tensor


def batches(runs: Sequence[QueryRun]) -> tuple[tuple[Batch, ...], tuple[QueryRun, ...]]:
    """(batches, runs that are in none). Contexts in a batch differ in length by a factor of two at most."""
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
