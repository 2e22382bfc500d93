"""Sample the next tokens from rows of logits, by the sampling parameters of each row.

It owns penalties, filters, sampling and log probabilities; it must not know of ranks or of scheduling. The token of a
row does not depend on the other rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.rank.sampling.gumbel import sample_together
from longspan.engine.rank.sampling.random_numbers import mix, uniform
from longspan.errors import EngineError
from longspan.request import PromptScore, SampledToken, SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM: dividing by them would overflow."""

_LARGEST = 1e38


@dataclass(frozen=True)
class SampleRow:
    """One row of logits to sample."""

    # the completion's id
    request_id: str
    # its sampling parameters
    params: SamplingParams
    # the completion's seed; random numbers depend on it and on `position` only
    seed: int
    # index of the wanted token in the output, from 0
    position: int
    # the prompt; only read if `params.needs_history`
    prompt_token_ids: Sequence[int] = ()
    # the output before the wanted token; only read if `params.needs_history`
    output_token_ids: Sequence[int] = ()
    # bool [vocab]: tokens that may be sampled; None for all
    allowed: Tensor | None = None
    # further tokens that may not be sampled
    banned: Sequence[int] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the token is the argmax of the unchanged logits."""
        return _is_greedy(self.params) and not _changes_logits(self)


@dataclass(frozen=True)
class Sampling:
    """Tokens that a device may still be computing."""

    # int64 [R], on the device of the logits
    token_ids: Tensor
    # waits for the device and returns the tokens
    finish: Callable[[], Sampled]


@dataclass(frozen=True)
class Sampled:
    """The result of sampling a batch."""

    # tokens of requests whose rows could all be sampled, in the order of the rows
    tokens: list[SampledToken]
    # by request id, why a request cannot go on
    errors: dict[str, str]


def start_sampling(logits: Tensor, rows: Sequence[SampleRow]) -> Sampling:
    """Start sampling one token for each row of `logits` fp32 [R, vocab], which are not changed.

    The order of operations is vLLM's: penalties, temperature, top-k, top-p, min-p, then Gumbel sampling. Log
    probabilities are those of the logits before all of these. On a GPU nothing is read from the device before
    `Sampling.finish` is called. A row that holds NaN or +inf, or nothing but -inf, is an error of its request alone.

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
        token_ids[_ids(others, logits)] = _sample_rows(logits, peaks.values.isfinite(), others, rows)

    # copies, because the caller may overwrite the logits (a CUDA graph does) before `finish` is called
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
    """Start copies of tensors, of any shape, to the CPU; the returned function waits for them.

    The copies are queued on the current stream now, so they do not wait for kernels that are launched later.
    """
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
    """Log probabilities of `tokens`, R adjacent tokens of a prompt from `position` on, under `logits` fp32 [R, vocab].

    `count` is the number of alternatives for each token.
    """
    return [
        PromptScore(request_id, position + row, _logprobs(logits[row], token, count))
        for row, token in enumerate(tokens)
    ]


def penalise(logits: Tensor, row: SampleRow) -> Tensor:
    """A copy of `logits` fp32 [vocab] with the row's biases and penalties; tokens that must not be sampled have -inf.

    Penalties are vLLM's, which follow OpenAI and CTRL. The repetition penalty divides the positive and multiplies the
    negative logits of each distinct token in prompt and output. The frequency penalty is subtracted for each occurrence
    in the output, the presence penalty once for each distinct token of the output.
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
    result.clamp_(-_LARGEST, _LARGEST)  # a tiny repetition penalty gives infinities, whose differences are NaN
    if row.allowed is not None:
        result.masked_fill_(~row.allowed.to(logits.device), float("-inf"))
    if row.banned:
        result.index_fill_(0, _ids(row.banned, logits), float("-inf"))
    return result


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


def best(values: Tensor, k: int) -> Tensor:
    """Indices int64 of the `k` largest of `values` [vocab] and of all that are tied with the k-th; ties by index.

    The best is first. `torch.topk` alone does not define which of several equal values it takes.
    """
    if k >= len(values):
        return values.sort(descending=True, stable=True).indices
    threshold = values.topk(k, sorted=False).values.amin()
    ids = (values >= threshold).nonzero().squeeze(1)
    return ids[values[ids].sort(descending=True, stable=True).indices]


def _sample_rows(logits: Tensor, finite: Tensor, chosen: Sequence[int], rows: Sequence[SampleRow]) -> Tensor:
    """Token ids int64 of the rows `chosen` of `logits` fp32 [R, vocab], which are not plain.

    Rows that are not `finite`, bool [R], get any token: their requests end. On a GPU the rows are sampled together,
    because the code for one row reads from the device.
    """
    if logits.device.type == "cpu":
        usable = finite.tolist()
        return _ids([_sample_row(logits[i], rows[i]) if usable[i] else 0 for i in chosen], logits)
    changed = torch.stack([penalise(logits[i], rows[i]) if _changes_logits(rows[i]) else logits[i] for i in chosen])
    changed.masked_fill_(~finite[_ids(chosen, logits)][:, None], 0.0)
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
    # Random numbers belong to token ids, not to places in the sorted row. So if the logits of two ranks differ in the
    # last bit, which may swap two candidates, both ranks still sample the same token.
    tokens = torch.arange(len(logits), device=logits.device) if ids is None else ids
    noise = uniform([mix(row.seed, row.position)], tokens)[0]
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


def _logprobs(raw: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log probabilities of `token` and of the `count` most likely tokens under raw logits fp32 [vocab]."""
    normaliser = raw.logsumexp(dim=0)
    sampled = float(raw[token] - normaliser)
    if count == 0:
        return TokenLogprobs(sampled, (), ())
    ids = best(raw, count)[:count]
    return TokenLogprobs(sampled, tuple(ids.tolist()), tuple((raw[ids] - normaliser).tolist()))


def _not_finite(peaks: Tensor, rows: Sequence[SampleRow]) -> dict[str, str]:
    """Errors of rows that cannot be sampled, by request id, given the maximum of each row, `peaks` fp32 [R].

    The maximum of a row with NaN is NaN, so it shows every such row.
    """
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
    params = row.params
    return params.penalises or bool(params.logit_bias) or row.allowed is not None or bool(row.banned)


def _ids(tokens: Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64, device=like.device)
