"""What a run's outcomes come to: rates, latencies and failures.

It owns the definitions of what is reported; it must not know how requests were sent or how a report is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from longspan.bench.serving.client import Finished, Outcome

_DETAIL = 200  # characters shown of what was said of an error


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of a latency, in seconds."""

    mean: float
    median: float
    p90: float
    p99: float


@dataclass(frozen=True)
class ErrorCount:
    """How many requests failed in one way, and what was said of the first."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True)
class RunReport:
    """One run. Latencies are of completed requests, seconds; a spread is None when there is nothing to measure.

    - `concurrency`: the limit asked for, None without one; `peak_concurrency`: the most requests in flight.
    - `duration_s`: from the start of the run to the end of its last request.
    - `requests_per_s`, `output_tokens_per_s`, `total_tokens_per_s`: of completed requests, over the duration; the
      total is prompt and output.
    - `short_outputs`: completed requests with fewer tokens than asked for.
    - `counted_requests`: completed requests whose tokens were counted here, as the server sent no usage.
    - `ttft_s`: from sending a request to its first chunk with a token. Waiting for a free place does not count.
    - `tpot_s`: time per output token after the first: (last chunk - first chunk) / (output tokens - 1).
    - `itl_s`: between two chunks of a request, over all requests. A chunk may hold several tokens.
    - `e2e_s`: from sending a request to its last chunk with a token.
    - `max_send_delay_s`: the longest a request left after it was due, for want of a free place or of client time.
    - `client_cpu`: this process' share of a core; near 1 the client itself is the limit and latencies are too long.
    """

    concurrency: int | None
    peak_concurrency: int
    completed: int
    failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    short_outputs: int
    counted_requests: int
    ttft_s: Spread | None
    tpot_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    max_send_delay_s: float
    client_cpu: float
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
    """Mean and percentiles, on a straight line between neighbours; None of nothing."""
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
