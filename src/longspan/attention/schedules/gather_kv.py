"""Keys travel: the needed pages are gathered round by round into a bounded workspace; no partials return.

It owns the rounds, which follow from the plan alone, so every rank joins the same number of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.attention.cost import LayerTime, StepTotals
from longspan.attention.partial import Partial
from longspan.attention.schedules.base import Join, Schedule
from longspan.cache.pages import Span, clip_spans
from longspan.plan.reach import KeyRun, QueryRun

_NAME = "gather_kv"


def run(join: Join) -> Partial:
    """Partials [T, Hq, D] of this rank's travelling rows over all pages of the context group."""
    shares = join.reach.shares
    group = join.group
    span = max(1, group.workspace_tokens // len(shares))
    longest = max(share.tokens for share in shares)
    parts = [Partial.empty(join.q.shape[0], join.q.shape[1], join.form.value_dim, join.q)]
    for start in range(0, longest, span):
        stop = start + span
        own = join.kv.take(clip_spans(shares[group.collectives.rank].spans, start, stop)).packed()
        tokens = [min(max(share.tokens - start, 0), span) for share in shares]
        gathered = group.collectives.all_gather(own, tokens, _NAME, dim=2)
        for shard, kv in enumerate(gathered):
            runs = runs_in_round(join.reach.key_runs, shard, start, stop)
            if runs:
                parts.append(join.form.own(join.q, runs, join.kv.unpacked(kv)))
        parts = [join.form.merge(parts)]
    return parts[0]


def runs_in_round(key_runs: Sequence[KeyRun], shard: int, start: int, stop: int) -> list[QueryRun]:
    """What the rows see of tokens [start, stop) of a shard's share."""
    runs: list[QueryRun] = []
    for run in key_runs:
        offset, length = run.span
        low, high = max(offset, start), min(offset + length, stop)
        if run.shard == shard and low < high:
            lows = None if run.lows is None else tuple(max(0, x - (low - offset)) for x in run.lows)
            runs.append(QueryRun(run.row, run.length, (Span(low - start, high - low),), lows))
    return runs


def seconds(step: StepTotals) -> LayerTime:
    """One collective a round."""
    model = step.model
    arriving, handled, rounds = step.keys(model.workspace_tokens // model.group.members)
    return LayerTime(
        fixed=rounds * step.fixed(_NAME, 1, step.key_calls),
        compute=step.key_compute,
        transfer=model.exchange(arriving),
        copies=handled * model.constants.copy_s,
    )


SCHEDULE = Schedule(
    name=_NAME,
    moves="keys",
    run=run,
    bytes=StepTotals.keys_sent,
    seconds=seconds,
    colour="#ae5c00",
    sentence="keys travel to the queries, gathered",
)
