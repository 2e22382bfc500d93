"""Prometheus metrics, with vLLM's names and the prefix `longspan:`, and the history of the live page.

It owns what is counted and when; it must not know how a figure is shown.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from longspan.request import FinishReason, RequestOutput
from longspan.server.messages import CoreLoad, CoreState

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = tuple(step * 10**power for power in range(7) for step in (1, 2, 5))  # 1 to 5 million
_TTFT_WINDOW = 64
_HISTORY = 120


class Metrics:
    """The metrics of one server. `tick` must be called once a second."""

    def __init__(self, model: str, pages_per_shard: tuple[int, ...]) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._pages = pages_per_shard
        self._waiting = self._gauge("num_requests_waiting", "completions that wait")
        self._running = self._gauge("num_requests_running", "completions that run")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "share of a shard's pages that requests hold", "shard")
        self._preemptions = self._counter("num_preemptions", "preemptions of requests")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "tokens drafted")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "drafted tokens that were accepted")
        self._moved = self._counter(
            "bytes_moved", "bytes sent between ranks, by schedule, or tp, pp, ... for what no schedule sends", "purpose"
        )
        self._offload = self._counter("kv_offload_pages", "pages offloaded, by what became of them", "event")
        self._transfer = self._counter("kv_transfer", "KV transfers between instances, by what is counted", "what")
        self._restarts = self._counter("engine_restarts", "times the ranks were started again")
        self._prompt = self._counter("prompt_tokens", "prompt tokens of requests that began to generate")
        self._cached = self._counter("prefix_cache_hits", "prompt tokens the prefix cache had")
        self._queried = self._counter("prefix_cache_queries", "prompt tokens looked for in the prefix cache")
        self._output = self._counter("generation_tokens", "tokens generated")
        self._success = self._counter("request_success", "requests that ended", "finished_reason")
        self._errors = self._counter("request_errors", "requests answered with an error", "status")
        self._ttft = self._histogram("time_to_first_token_seconds", "arrival to first token")
        self._itl = self._histogram("inter_token_latency_seconds", "between tokens of a completion")
        self._e2e = self._histogram("e2e_request_latency_seconds", "arrival to end")
        self._prompt_size = self._histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self._output_size = self._histogram("request_generation_tokens", "tokens generated of a completion", _TOKENS)
        self.totals = {"prompt_tokens": 0, "output_tokens": 0, "requests": 0, "prefix_cached_tokens": 0}
        self.load = CoreLoad(used_pages=(0,) * len(pages_per_shard))
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._recent_ttft: deque[float] = deque(maxlen=_TTFT_WINDOW)
        # by counter and labels, what the present core had counted when the counter was last brought up to date
        self._counted: dict[tuple[Counter, tuple[str, ...]], float] = {}
        self._last = (time.monotonic(), 0, 0)
        self._started = self._last[0]

    def first_token(self, output: RequestOutput, seconds: float) -> None:
        """Count a request's first token, `seconds` after its arrival."""
        prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
        for counter, tokens in ((self._prompt, prompt), (self._queried, prompt), (self._cached, cached)):
            counter.labels(self._model).inc(tokens)
        self._ttft.labels(self._model).observe(seconds)
        self._recent_ttft.append(seconds)
        self.totals["prompt_tokens"] += prompt
        self.totals["prefix_cached_tokens"] += cached

    def tokens(self, count: int, since_last: float | None) -> None:
        """Count `count` tokens of one completion, `since_last` seconds after its previous ones (None: the first)."""
        self._output.labels(self._model).inc(count)
        self.totals["output_tokens"] += count
        if since_last is not None:
            for _ in range(count):
                self._itl.labels(self._model).observe(since_last / count)

    def ended(self, output: RequestOutput, seconds: float) -> None:
        """Count a request that has ended or was aborted, `seconds` after its arrival."""
        self.totals["requests"] += 1
        self._prompt_size.labels(self._model).observe(len(output.prompt_token_ids))
        for completion in output.outputs:
            self._output_size.labels(self._model).observe(len(completion.token_ids))
            reason = completion.finish_reason or FinishReason.ABORT
            self._success.labels(self._model, reason.value).inc()
        self._e2e.labels(self._model).observe(seconds)

    def failed(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._errors.labels(self._model, str(status)).inc()

    def restarted(self) -> None:
        """Count a restart of the core, and reset its load."""
        self._restarts.labels(self._model).inc()
        self._counted.clear()
        self.load = CoreLoad(used_pages=(0,) * len(self._pages))

    def tick(self) -> None:
        """Add the time since the last call to the history."""
        now, (before, outputs, prompts) = time.monotonic(), self._last
        seconds = max(now - before, 1e-9)
        self.history.append(
            {
                "t": round(now - self._started, 1),
                "output_tokens_per_s": round((self.totals["output_tokens"] - outputs) / seconds, 2),
                "prompt_tokens_per_s": round((self.totals["prompt_tokens"] - prompts) / seconds, 2),
                "running": self.load.scheduler.running,
                "waiting": self.load.scheduler.waiting,
                "ttft_median_s": round(median(self._recent_ttft), 4) if self._recent_ttft else None,
            }
        )
        self._last = (now, self.totals["output_tokens"], self.totals["prompt_tokens"])

    def render(self, state: CoreState | None) -> bytes:
        """The metrics in Prometheus' text format. `state` is None while there is no core."""
        if state:
            self.load = state.load
            for purpose, moved in state.bytes_by_label.items():
                self._advance(self._moved, moved, purpose)
        counted = self.load.scheduler
        self._waiting.labels(self._model).set(counted.waiting)
        self._running.labels(self._model).set(counted.running)
        self._advance(self._preemptions, counted.preemptions)
        self._advance(self._drafted, counted.drafted_tokens)
        self._advance(self._accepted, counted.accepted_tokens)
        for shard, (used, pages) in enumerate(zip(self.load.used_pages, self._pages, strict=False)):
            self._kv_usage.labels(self._model, str(shard)).set(used / pages)
        for counter, counts in ((self._offload, self.load.offload), (self._transfer, self.load.transfer)):
            for name, count in asdict(counts).items() if counts else ():
                self._advance(counter, count, name)
        return generate_latest(self.registry)

    def _advance(self, counter: Counter, count: float, *labels: str) -> None:
        """Bring a counter to what a core has counted since it started, on top of what earlier cores had counted."""
        before = self._counted.get((counter, labels), 0.0)
        counter.labels(self._model, *labels).inc(max(0.0, count - before))
        self._counted[counter, labels] = count

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"longspan:{name}", help_text, ["model_name", *labels], registry=self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"longspan:{name}", help_text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"longspan:{name}", help_text, ["model_name"], buckets=buckets, registry=self.registry)
