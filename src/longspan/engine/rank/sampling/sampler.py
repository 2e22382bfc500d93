"""Chooses the next tokens from rows of logits, as each row's sampling parameters say.

It owns penalties, filters, noise and log-probabilities; it must not know of ranks, of scheduling,
or of which rows happen to share its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.rank.sampling.gumbel import sample_together
from longspan.engine.rank.sampling.noise import mix, uniform
from longspan.errors import EngineError
from longspan.request import PromptScore, SampledToken, SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM: dividing by less would only overflow."""

_LARGEST = 1e38


@dataclass(frozen=True)
class SampleRow:
    """One row of logits to sample.

    `seed` is the request's resolved seed and `position` the index of the wanted token in the request's
    output (0 is the first): the noise depends on these two only. The histories are read only if
    `params.needs_history`. `allowed` [V] are the tokens that a grammar leaves, None for all.
    """

    request_id: str
    params: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    allowed: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the largest logit is the token, as it stands."""
        return _is_greedy(self.params) and not _changes_logits(self)


@dataclass(frozen=True)
class Sampling:
    """Tokens being sampled: `token_ids` [R] int64 on the device of the logits, and what remains to be read from it."""

    token_ids: Tensor
    finish: Callable[[], Sampled]


@dataclass(frozen=True)
class Sampled:
    """What became of a batch."""

    # of requests all of whose rows could be sampled, in the order of the rows
    tokens: list[SampledToken]
    # by request why it cannot go on
    errors: dict[str, str]


def start_sampling(logits: Tensor, rows: Sequence[SampleRow]) -> Sampling:
    """One token for each row of `logits` [R, V] fp32, which is left as it was.

    Where the largest logits are the tokens nothing is read from the device before `finish` is called.

    The order is vLLM's documented one: penalties, temperature, top-k, top-p, min-p, then a race of
    exponentials. Log-probabilities, where asked for, are of the logits before all of these. A row's
    result does not depend on the other rows. A row that holds NaN or +inf, or nothing but -inf, is an error of its
    request alone.

    Raises:
        EngineError: the shape does not fit the rows.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise EngineError(
            f"logits have shape {tuple(logits.shape)} for {len(rows)} tokens to sample; "
            f"give shape [{len(rows)}, vocabulary]"
        )
    peaks = logits.max(dim=-1) if rows else logits.new_empty(0, 1).max(dim=-1)
    token_ids = peaks.indices
    others = [i for i, row in enumerate(rows) if not row.is_plain]
    if others:
        finite = peaks.values.isfinite()
        all_finite = logits.device.type == "cpu" and bool(finite.all())  # a GPU would be waited for
        usable = logits if all_finite else torch.where(finite[:, None], logits, 0.0)
        token_ids[_ids(others, logits)] = _sample_rows(usable, others, rows)

    described = {i: logits[i].clone() for i, row in enumerate(rows) if row.params.logprobs is not None}
    arrived = _on_its_way(token_ids, peaks.values)

    def finish() -> Sampled:
        tokens, highest = arrived()
        errors = _not_finite(highest, rows)
        good = [
            (i, row, token)
            for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True))
            if row.request_id not in errors
        ]
        found: list[SampledToken] = []
        for i, row, token in good:
            logprobs = _logprobs(described[i], token, row.params.logprobs or 0) if i in described else None
            found.append(SampledToken(row.request_id, token, logprobs, row.position))
        return Sampled(found, errors)

    return Sampling(token_ids, finish)


def _on_its_way(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Copies for the CPU that start now, behind what computes them and before anything that is launched later."""
    if tensors[0].device.type == "cpu":
        return lambda: list(tensors)
    copies = [torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def arrived() -> list[Tensor]:
        done.synchronize()
        return copies

    return arrived


def score(logits: Tensor, request_id: str, position: int, tokens: Sequence[int], count: int) -> list[PromptScore]:
    """What `logits` [R, V] give the prompt's own `tokens` [R], of which the first is at `position`."""
    return [
        PromptScore(request_id, position + row, _logprobs(logits[row], token, count))
        for row, token in enumerate(tokens)
    ]


def penalise(logits: Tensor, row: SampleRow) -> Tensor:
    """A copy of `logits` [V] with the row's biases, penalties and what its grammar forbids at -inf.

    Penalties are vLLM's, which follow OpenAI and CTRL.

    Repetition divides positive and multiplies negative logits of every token of prompt and output, once;
    frequency subtracts for each occurrence in the output, presence once for each distinct token there.
    """
    params = row.params
    result = logits.clone()
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        result.index_add_(0, _ids(tokens, result), torch.tensor(biases, dtype=result.dtype, device=result.device))
    output = _ids(row.output_token_ids, logits)
    if params.repetition_penalty != 1.0:
        seen = torch.cat((_ids(row.prompt_token_ids, logits), output))
        values = result[seen]
        rate = params.repetition_penalty
        result[seen] = torch.where(values > 0, values / rate, values * rate)
    if params.frequency_penalty or params.presence_penalty:
        counts = output.bincount(minlength=len(result))
        result -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    result.clamp_(-_LARGEST, _LARGEST)  # a tiny repetition penalty makes infinities, and their differences NaN
    if row.allowed is not None:
        result.masked_fill_(~row.allowed.to(logits.device), float("-inf"))
    return result


def filter_tokens(logits: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """What temperature, top-k, top-p and min-p leave of `logits` [V]; `params` must not be greedy.

    Returns (ids [K] int64, scaled [K] fp32): the tokens that may be sampled (None: all V, in order), and
    their logits over the temperature, shifted so that the best of them is 0: softmax(scaled) are their
    probabilities. Tokens tied with the k-th best stay in the top-k, as in vLLM; ties at the edge of top-p
    go to the lowest id.
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


def best(values: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest of `values` [V] and of all tied with the last, best first, ties by index.

    `torch.topk` alone leaves open which of several equal values it takes.
    """
    if k >= len(values):
        return values.sort(descending=True, stable=True).indices
    threshold = values.topk(k, sorted=False).values.amin()
    ids = (values >= threshold).nonzero().squeeze(1)
    return ids[values[ids].sort(descending=True, stable=True).indices]


def _sample_rows(logits: Tensor, chosen: Sequence[int], rows: Sequence[SampleRow]) -> Tensor:
    """Token ids of those rows of logits [R, V] that are not plain; on a GPU together: a row at a time would wait."""
    if logits.device.type == "cpu":
        return _ids([_sample_row(logits[i], rows[i]) for i in chosen], logits)
    changed = torch.stack([penalise(logits[i], rows[i]) if _changes_logits(rows[i]) else logits[i] for i in chosen])
    greedy = torch.tensor([_is_greedy(rows[i].params) for i in chosen], device=logits.device)
    drawn = sample_together(
        changed, [rows[i].params for i in chosen], [(rows[i].seed, rows[i].position) for i in chosen]
    )
    return torch.where(greedy, changed.argmax(-1), drawn)


def _sample_row(logits: Tensor, row: SampleRow) -> int:
    if _changes_logits(row):
        logits = penalise(logits, row)
    if _is_greedy(row.params):
        return int(logits.argmax())
    ids, scaled = filter_tokens(logits, row.params)
    # Noise belongs to token ids, not to ranks in the sorted row: where two ranks' arithmetic differs in
    # the last bit and swaps two candidates, the winner stays the same.
    tokens = torch.arange(len(logits), device=logits.device) if ids is None else ids
    noise = uniform([mix(row.seed, row.position)], tokens)[0]
    # -log(noise) is Exp(1), and argmax of p / Exp(1) is taken in logarithms; fp64, so that no probability
    # is rounded to 0; in place, because fresh memory for a whole vocabulary costs more than the arithmetic.
    winner = (scaled - noise.log_().neg_().log_()).argmax()
    return int(tokens[winner])


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """Indices [K] of the fewest of `scaled` [V], best first, whose probability reaches `top_p`."""
    weights = scaled.exp()
    total = weights.sum(dtype=torch.float64)
    # Tokens that each have less than a V-th of 1 - top_p make less than 1 - top_p together: they lie
    # outside whatever their order, and sorting the few others is what makes top-p cheap.
    ids = (weights >= total * ((1 - top_p) / len(scaled))).nonzero().squeeze(1)
    ids = ids[scaled[ids].sort(descending=True, stable=True).indices]
    mass = weights[ids].cumsum(0, dtype=torch.float64) / total
    return ids[: int((mass < top_p).sum()) + 1]


def _logprobs(raw: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of raw logits [V]: the sampled token's, and those of the `count` most likely."""
    normaliser = raw.logsumexp(dim=0)
    sampled = float(raw[token] - normaliser)
    if count == 0:
        return TokenLogprobs(sampled, (), ())
    ids = best(raw, count)[:count]
    return TokenLogprobs(sampled, tuple(ids.tolist()), tuple((raw[ids] - normaliser).tolist()))


def _not_finite(peaks: Tensor, rows: Sequence[SampleRow]) -> dict[str, str]:
    """By request why it cannot be sampled. NaN wins every maximum, so one reduction finds all such rows."""
    return {
        rows[
            i
        ].request_id: f"logits at output position {rows[i].position} have maximum {float(peaks[i])}: no token can "
        "be sampled; check the weights, or use a wider dtype (float32) if activations overflow"
        for i in (~peaks.isfinite()).nonzero().squeeze(1).tolist()
    }


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def _changes_logits(row: SampleRow) -> bool:
    return row.params.penalises or bool(row.params.logit_bias) or row.allowed is not None


def _ids(tokens: Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64, device=like.device)
