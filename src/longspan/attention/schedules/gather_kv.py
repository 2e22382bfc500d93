"""Keys travel: the needed pages are gathered round by round into a bounded workspace; no partials return.

It owns the rounds, which follow from the plan alone, so every rank joins the same number of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.attention.partial import Partial, merge
from longspan.attention.pool import read_spans
from longspan.attention.schedules.base import Join
from longspan.cache.pages import Span
from longspan.view import KeyRun, QueryRun

_LABEL = "gather_kv"


def run(join: Join) -> Partial:
    """Partials [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    shares = join.view.shares
    window = max(1, join.workspace_tokens // len(shares))
    longest = max(share.tokens for share in shares)
    parts = [Partial.empty(join.q.shape[0], join.q.shape[1], join.value_dim, join.q)]
    for start in range(0, longest, window):
        stop = start + window
        own = read_spans(join.kv, clip(shares[join.group.rank].spans, start, stop))
        tokens = [min(max(share.tokens - start, 0), window) for share in shares]
        gathered = join.group.all_gather(own, tokens, _LABEL, dim=2)
        for shard, kv in enumerate(gathered):
            runs = _runs_in_window(join.view.key_runs, shard, start, stop)
            if runs:
                parts.append(join.attend(join.q, runs, kv, join.heads.own))
        parts = [merge(parts)]
    return parts[0]


def clip(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The slots of tokens [start, stop), counted over `spans` one behind the other."""
    found: list[Span] = []
    at = 0
    for span in spans:
        low, high = max(start - at, 0), min(stop - at, span.length)
        if low < high:
            found.append(Span(span.slot + low, high - low))
        at += span.length
    return found


def _runs_in_window(key_runs: Sequence[KeyRun], shard: int, start: int, stop: int) -> list[QueryRun]:
    runs: list[QueryRun] = []
    for run in key_runs:
        offset, length = run.seen[shard]
        low, high = max(offset, start), min(offset + length, stop)
        if low < high:
            runs.append(QueryRun(run.row, run.length, (Span(low - start, high - low),)))
    return runs
