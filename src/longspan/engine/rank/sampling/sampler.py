"""Sample the next tokens from rows of logits, by the sampling parameters of each row.

It owns the order of a batch's work, and sampling of one row on a CPU; it must not know of ranks or of scheduling. The
token of a row does not depend on the other rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from longspan.engine.rank.sampling.gumbel import draw_plainly, outcome
from longspan.engine.rank.sampling.logit_changes import LogitChanges, PenaltyCounts
from longspan.engine.rank.sampling.logprobs import best, describe, on_host
from longspan.engine.rank.sampling.parameters import ParameterTable, RowParameters
from longspan.engine.rank.sampling.random_numbers import mix, seeds, uniform
from longspan.engine.rank.sampling.recorded import Draw, RecordedDraw
from longspan.engine.rank.sampling.rows import GREEDY_BELOW, LateRows, SampleRow, SampleRows
from longspan.engine.rank.sampling.transfer import OneCopy, start_reading
from longspan.engine.rank.sampling.trial import tried
from longspan.errors import EngineError
from longspan.request import SampledToken, SamplingParams

_ROWS_AT_ONCE = 32  # on a CPU, where something is made from the logits


@dataclass(frozen=True)
class Sampling:
    """Tokens that a device may still be computing."""

    # what is drawn, int64 [2, R], on the device of the logits: see `outcome`
    drawn: Tensor
    # waits for the device and returns the tokens
    finish: Callable[[], Sampled]

    @property
    def token_ids(self) -> Tensor:
        """The tokens, int64 [R]."""
        return self.drawn[0]


@dataclass(frozen=True)
class Sampled:
    """The result of sampling a batch."""

    # tokens of requests that can go on, in the order of the rows. A row behind drafts has none if it cannot be sampled
    tokens: list[SampledToken]
    # by request id, why a request cannot go on
    errors: dict[str, str]

    @staticmethod
    def joined(parts: Sequence[Sampled]) -> Sampled:
        """The results of parts of a batch as one."""
        return Sampled(
            [token for part in parts for token in part.tokens],
            {request_id: error for part in parts for request_id, error in part.errors.items()},
        )


class Sampler:
    """Samples the steps of one rank, in order.

    It keeps on the device what changes only when the rows do, and the counts of tokens that penalties read. `draw`
    draws a batch; without it the device decides, and a CPU takes one row after the other, which is faster there. With
    `drafts_are_late` every step that is started must be followed by `accept`.
    """

    def __init__(self, draw: Draw | None = None, drafts_are_late: bool = False) -> None:
        self._draw = draw
        self._counts = PenaltyCounts(drafts_are_late)
        self._known = ParameterTable()
        # parameters and seeds of the last rows, and what they come to
        self._rows: tuple[Sequence[SamplingParams], Sequence[int]] = (), ()
        self._batch = RowParameters(None, frozenset(), ())

    def forget(self, request_id: str) -> None:
        """The request has ended; its id may be used again."""
        self._counts.forget(request_id)

    def start(
        self, logits: Tensor, rows: SampleRows | Sequence[SampleRow], recorded: RecordedDraw | None = None,
        late: LateRows | None = None,
    ) -> Sampling:  # fmt: skip
        """Start sampling one token for each row of `logits` [R, vocab], of any float dtype, which are not changed.

        `recorded` draws from the same logits, if nothing changes them first. `late` is what only the device knows of
        the rows, on which noise and penalties depend.

        The order of operations is vLLM's: penalties, temperature, top-k, top-p, min-p, then Gumbel sampling. Log
        probabilities are those of the logits before all of these. On a GPU nothing is read from the device before
        `Sampling.finish` is called, and nothing that is copied to it waits for it. A row that holds NaN or +inf, or
        nothing but -inf, is an error of its request alone, and so is one with an error of its own. Behind drafts it is
        none: they may be wrong. The row is computed again once the tokens before it are known.

        Raises:
            EngineError: the shape does not fit the rows.
        """
        _check_shape(logits, len(rows))
        if not rows:
            return Sampling(logits.new_empty((2, 0), dtype=torch.int64), lambda: Sampled([], {}))
        rows = rows if isinstance(rows, SampleRows) else SampleRows.of(rows)
        draw = self._draw or batch_draw(logits.device.type)
        logits = logits if draw else logits.float()
        if self._rows != (rows.params, rows.seeds):  # of parameters that are the same objects no field is read
            self._rows = rows.params, rows.seeds
            self._batch = self._known.of(rows.params, rows.seeds, None if draw is None else logits.device)
        batch, upload = self._batch, OneCopy()
        forbidding = (i for i, row in rows.special.items() if row.allowed is not None or row.banned)
        chosen = sorted(batch.changing.union(forbidding))
        if draw is None and len(rows) > _ROWS_AT_ONCE and (chosen or batch.described):
            return self._start_in_parts(logits, rows, late)
        some = 0 < len(batch.described) < len(rows)
        wanted = upload.integers(batch.described) if some else None
        recorded = None if chosen or draw is None else recorded
        of_step = batch.draw is not None and recorded is None
        positions = upload.integers(rows.positions) if of_step else None
        changes = LogitChanges.of(rows, chosen, self._counts, logits, upload, late) if chosen else None
        sent = upload.send(logits.device)
        changed = None if changes is None else changes.apply(logits, self._counts, sent)
        if draw is None:
            drawn = _draw_rows(logits, changed, chosen, rows if late is None else _shifted(rows, late.shifts))
        elif recorded is not None:
            drawn = recorded.draw(batch.draw, rows.positions)
        else:
            full = logits if changes is None or changed is None else changes.put(changed, logits, sent)
            at = None if positions is None else sent[positions]
            drawn = draw(full, batch.draw, at if at is None or late is None else at + late.shifts)
            drawn = drawn if changes is None else outcome(drawn[0], logits.amax(-1).float())
        token_ids = drawn[0]
        if changes is not None:
            changes.sampled(token_ids, self._counts, sent)
        results, counts = [drawn], [rows.params[i].logprobs or 0 for i in batch.described]
        if counts:
            about = [logits, token_ids]
            if wanted is not None:
                about = [tensor.index_select(0, sent[wanted]) for tensor in about]
            results += describe(about[0], about[1], max(counts))
        return Sampling(drawn, _finish(start_reading(results), rows, batch.described, counts))

    def accept(self, rows: SampleRows, drawn: Tensor, accepted: Tensor) -> None:
        """Count for penalties what has been drawn, but behind wrong drafts, since steps do not wait until the host can.

        Args:
            rows: the rows of a step.
            drawn: their outcome, int64 [2, R].
            accepted: how many drafts of each of their requests are right, int64 [requests or more], in their order.
        """
        if self._counts.is_used:
            self._counts.accept(rows, drawn[0], accepted)

    def _start_in_parts(self, logits: Tensor, rows: SampleRows, late: LateRows | None) -> Sampling:
        """See `start`. What it makes from the logits is as large as they are, so it is made for some rows at a time."""
        some = [slice(at, at + _ROWS_AT_ONCE) for at in range(0, len(rows), _ROWS_AT_ONCE)]
        whole = [rows[i] for i in range(len(rows))]
        parts = [self.start(logits[at], whole[at], None, None if late is None else late.part(at)) for at in some]
        drawn = torch.cat([part.drawn for part in parts], dim=1)
        return Sampling(drawn, lambda: Sampled.joined([part.finish() for part in parts]))


def _finish(
    read: Callable[[], list[Tensor]], rows: SampleRows, described: Sequence[int], counts: Sequence[int]
) -> Callable[[], Sampled]:
    """What turns the tensors of a batch into records."""

    def finish() -> Sampled:
        (tokens, bits), *logprobs = read()
        found = dict(zip(described, on_host(logprobs, counts), strict=True)) if described else {}
        problems = _problems(bits.int().view(torch.float32), rows)
        errors = {rows.names[i]: problem for i, problem in problems.items() if not rows[i].drafts}
        good = [
            SampledToken(name, token, found.get(i), position)
            for i, (name, position, token) in enumerate(zip(rows.names, rows.positions, tokens.tolist(), strict=True))
            if i not in problems and name not in errors
        ]
        return Sampled(good, errors)

    return finish


@cache
def batch_draw(device_type: str) -> Draw | None:
    """How batches are drawn on a device; None: row by row. Kernels are tried first, when this is asked for."""
    if device_type == "cpu":
        return None
    if device_type == "cuda" and find_spec("triton") is not None:
        from longspan.engine.rank.sampling.kernels import draw

        return tried(draw, draw_plainly, torch.device(device_type))
    return draw_plainly


def filter_tokens(logits: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """Apply temperature, top-k, top-p and min-p to `logits` fp32 [vocab]; `params` must not be greedy.

    Returns (ids, scaled). `ids` int64 [K] are the tokens that may be sampled, None for the whole vocabulary in order.
    `scaled` fp32 [K] are their logits divided by the temperature and shifted so that the largest is 0; softmax(scaled)
    are their probabilities. Tokens tied with the k-th best stay in the top-k, as in vLLM. At the edge of top-p the
    lowest id of tied tokens is kept.
    """
    scaled = (logits - logits.amax()).div_(params.temperature)
    ids: Tensor | None = None
    if 0 < params.top_k < len(scaled):
        ids = best(scaled, params.top_k)
        scaled = scaled[ids]
    if params.top_p < 1.0:
        ids, scaled = _keep(ids, scaled, _nucleus(scaled, params.top_p))
    if params.min_p > 0.0:
        ids, scaled = _keep(ids, scaled, (scaled >= math.log(params.min_p)).nonzero().squeeze(1))
    return ids, scaled


def _keep(ids: Tensor | None, scaled: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    return kept if ids is None else ids[kept], scaled[kept]


def _draw_rows(logits: Tensor, changed: Tensor | None, chosen: Sequence[int], rows: SampleRows) -> Tensor:
    """See `Draw`: on a CPU, row by row. `changed` [C, vocab] are the rows `chosen` of `logits` with their changes.

    Rows that are not finite get any token: their requests end.
    """
    peaks = logits.max(dim=-1)
    token_ids = peaks.indices
    of_row = {} if changed is None else dict(zip(chosen, changed, strict=True))
    others = [i for i, one in enumerate(rows.params) if i in of_row or one.temperature >= GREEDY_BELOW]
    if others:
        usable = peaks.values.isfinite().tolist()
        drawn = [_sample_row(of_row.get(i, logits[i]), rows[i]) if usable[i] else 0 for i in others]
        token_ids[torch.tensor(others)] = torch.tensor(drawn)
    return outcome(token_ids, peaks.values)


def _check_shape(logits: Tensor, rows: int) -> None:
    if logits.dim() != 2 or logits.shape[0] != rows:
        raise EngineError(
            f"logits have shape {tuple(logits.shape)} for {rows} tokens to sample; give shape [{rows}, vocabulary]"
        )


def _shifted(rows: SampleRows, shifts: Tensor) -> SampleRows:
    """The rows at their positions, on a CPU."""
    at = enumerate(shifts.tolist())
    return SampleRows.of([rows[i]._replace(position=rows.positions[i] + shift) for i, shift in at])


def _sample_row(logits: Tensor, row: SampleRow) -> int:
    """One token from `logits` fp32 [vocab], which have their changes."""
    if row.is_greedy:
        return int(logits.argmax())
    ids, scaled = filter_tokens(logits, row.params)
    # Random numbers belong to token ids, not to places in the sorted row. So if the logits of two ranks differ in the
    # last bit, which may swap two candidates, both ranks still sample the same token.
    tokens = torch.arange(len(logits)) if ids is None else ids
    noise = uniform(seeds([mix(row.seed, row.position)]), tokens)[0]
    # -log(noise) is Exp(1), so argmax(p / Exp(1)) samples from p; it is taken in logarithms. In fp64, so that no
    # probability is rounded to 0. In place, because allocating for a whole vocabulary costs more than the arithmetic.
    winner = (scaled - noise.log_().neg_().log_()).argmax()
    return int(tokens[winner])


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """Indices int64 [K] of the smallest set of `scaled` [vocab] whose probability reaches `top_p`, best first."""
    weights = scaled.exp()
    total = weights.sum(dtype=torch.float64)
    # Tokens whose probability is below (1 - top_p) / vocab have less than 1 - top_p together, so none of them can be
    # in the nucleus. Only the few others have to be sorted.
    ids = (weights >= total * ((1 - top_p) / len(scaled))).nonzero().squeeze(1)
    ids = ids[scaled[ids].sort(descending=True, stable=True).indices]
    mass = weights[ids].cumsum(0, dtype=torch.float64) / total
    return ids[: int((mass < top_p).sum()) + 1]


def _problems(peaks: Tensor, rows: SampleRows) -> dict[int, str]:
    """Why rows cannot be sampled, by their index, given the maximum of each row, `peaks` fp32 [R].

    The maximum of a row with NaN is NaN, so it shows every such row.
    """
    found = {i: row.error for i, row in rows.special.items() if row.error}
    for i, peak in enumerate(peaks.tolist()):
        if i not in found and not math.isfinite(peak):
            found[i] = (
                f"logits at output position {rows.positions[i]} have maximum {peak}: no token can be sampled; check "
                "the weights, or use a wider dtype (float32) if activations overflow"
            )
    return found
