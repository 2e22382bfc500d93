"""Summarise the outcomes of a run: rates, latencies and failures.

It owns the definitions of what is reported; it must not know how requests were sent or how a report is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from longspan.bench.serving.client import Finished, Outcome

_DETAIL = 200  # characters of an error's message


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of a latency, in seconds."""

    mean: float
    median: float
    p90: float  # 90th percentile
    p99: float  # 99th percentile


@dataclass(frozen=True)
class ErrorCount:
    """The failures of one kind."""

    # `Failure.kind`
    kind: str
    # number of requests
    count: int
    # message of the first of them
    example: str


@dataclass(frozen=True)
class RunReport:
    """The report of one run.

    Tokens, rates and latencies are those of completed requests. Latencies are in seconds; a spread is None if there is
    nothing to measure.
    """

    # limit on requests in flight; None: no limit
    concurrency: int | None
    # the most requests in flight at the same time
    peak_concurrency: int
    # requests that completed
    completed: int
    # requests that failed
    failed: int
    # from the start of the run to the end of its last request
    duration_s: float
    # tokens of all prompts
    prompt_tokens: int
    # tokens generated
    output_tokens: int
    # completed requests over `duration_s`
    requests_per_s: float
    # tokens generated over `duration_s`
    output_tokens_per_s: float
    # prompt and output tokens over `duration_s`
    total_tokens_per_s: float
    # requests with fewer tokens than asked for
    short_outputs: int
    # requests whose tokens were counted here, because the server sent no usage
    counted_requests: int
    # time to first token: from sending a request, so without waiting for the concurrency limit
    ttft_s: Spread | None
    # time per output token after the first: (last chunk - first chunk) / (output tokens - 1)
    tpot_s: Spread | None
    # inter-token latency: between two chunks of a request, over all requests; a chunk may hold several tokens
    itl_s: Spread | None
    # end to end: from sending a request to its last chunk with a token
    e2e_s: Spread | None
    # the longest time from when a request was due until it was sent, because of the concurrency limit or a busy client
    max_send_delay_s: float
    # this process's share of a CPU core; near 1 the client is the limit, and latencies are too long
    client_cpu: float
    # failures by kind, the most frequent first
    errors: tuple[ErrorCount, ...]


def summarise(finished: Finished, concurrency: int | None) -> RunReport:
    """The report of one run."""
    done = [outcome for outcome in finished.outcomes if outcome.failure is None]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in done)
    output_tokens = sum(outcome.output_tokens for outcome in done)
    seconds = finished.seconds
    return RunReport(
        concurrency=concurrency,
        peak_concurrency=finished.peak,
        completed=len(done),
        failed=len(finished.outcomes) - len(done),
        duration_s=seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=output_tokens / seconds,
        total_tokens_per_s=(prompt_tokens + output_tokens) / seconds,
        short_outputs=sum(outcome.output_tokens < outcome.asked_tokens for outcome in done),
        counted_requests=sum(outcome.counted for outcome in done),
        ttft_s=spread([outcome.chunk_times[0] - outcome.start_s for outcome in done]),
        tpot_s=spread([_tpot(outcome) for outcome in done if outcome.output_tokens > 1]),
        itl_s=spread([later - earlier for outcome in done for earlier, later in pairwise(outcome.chunk_times)]),
        e2e_s=spread([outcome.chunk_times[-1] - outcome.start_s for outcome in done]),
        max_send_delay_s=max(outcome.start_s - outcome.due_s for outcome in finished.outcomes),
        client_cpu=finished.client_cpu,
        errors=count_errors(finished.outcomes),
    )


def _tpot(outcome: Outcome) -> float:
    return (outcome.chunk_times[-1] - outcome.chunk_times[0]) / (outcome.output_tokens - 1)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and percentiles, interpolated linearly; None for no values."""
    if not values:
        return None
    median, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Spread(fmean(values), median, p90, p99)


def count_errors(outcomes: Sequence[Outcome]) -> tuple[ErrorCount, ...]:
    """Failures by kind, the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            kinds.setdefault(outcome.failure.kind, []).append(outcome.failure.detail)
    errors = [ErrorCount(kind, len(details), " ".join(details[0].split())[:_DETAIL]) for kind, details in kinds.items()]
    return tuple(sorted(errors, key=lambda error: -error.count))
