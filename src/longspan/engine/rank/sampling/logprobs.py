"""Log probabilities of sampled tokens and of tokens of prompts, for many rows at once.

It owns how they are computed on a device, and their form on the host. Nothing is read before a result is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.attention.host_copy import integers
from longspan.engine.rank.sampling.transfer import start_reading
from longspan.request import PromptScore, TokenLogprobs

_LOW_BITS = (1 << 32) - 1


def best(values: Tensor, k: int) -> Tensor:
    """Indices int64 of the `k` largest of `values` [vocab] and of all that are tied with the k-th; ties by index.

    The best is first. `torch.topk` alone does not define which of several equal values it takes.
    """
    if k >= len(values):
        return values.sort(descending=True, stable=True).indices
    threshold = values.topk(k, sorted=False).values.amin()
    ids = (values >= threshold).nonzero().squeeze(1)
    return ids[values[ids].sort(descending=True, stable=True).indices]


def describe(logits: Tensor, token_ids: Tensor, count: int) -> list[Tensor]:
    """Log probabilities under `logits` [L, vocab] of `token_ids` int64 [L], and of the `count` most likely tokens.

    Returns [fp32 [L], int64 [L, count], fp32 [L, count]]: the tokens', the ids of the most likely ones, best first and
    ties by id, and theirs. A vocabulary smaller than `count` gives all its tokens.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    sampled = (logits.gather(1, token_ids[:, None]) - normaliser)[:, 0]
    count = min(count, logits.shape[1])
    if not count:
        ids = token_ids.new_empty(len(logits), 0)
    elif logits.device.type == "cpu":
        ordered = logits.nan_to_num(float("-inf"), float("inf"), float("-inf"))  # a row that holds NaN ends alone
        ids = torch.stack([best(row, count)[:count] for row in ordered])
    else:
        ids = most_likely(logits, count)
    return [sampled, ids, logits.gather(1, ids) - normaliser]


def most_likely(logits: Tensor, count: int) -> Tensor:
    """Ids int64 [L, count] of the largest of `logits` [L, vocab], ties by id: integers that hold both are compared."""
    bits = (logits + 0.0).view(torch.int32).long()  # adding 0 makes one zero of two
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered << 32).add_(_LOW_BITS - ids)
    return _LOW_BITS - (keys.topk(count, dim=-1).values & _LOW_BITS)


def on_host(described: Sequence[Tensor], counts: Sequence[int]) -> list[TokenLogprobs]:
    """The result of `describe` on the CPU as records, with `counts` [L] alternatives each."""
    sampled, ids, values = (tensor.tolist() for tensor in described)
    return [
        TokenLogprobs(own, tuple(some[:count]), tuple(theirs[:count]))
        for own, some, theirs, count in zip(sampled, ids, values, counts, strict=True)
    ]


def start_scoring(
    logits: Tensor, request_id: str, position: int, tokens: Sequence[int], count: int
) -> Callable[[], list[PromptScore]]:
    """Start scoring `tokens`, R adjacent tokens of a prompt from `position` on, under `logits` [R, vocab].

    `count` is the number of alternatives for each token. The returned function waits for the device.
    """
    device_tokens = integers(tokens, logits.device)
    read = start_reading(describe(logits, device_tokens, count))

    def finish() -> list[PromptScore]:
        found = on_host(read(), [count] * len(tokens))
        return [PromptScore(request_id, position + row, logprobs) for row, logprobs in enumerate(found)]

    return finish
