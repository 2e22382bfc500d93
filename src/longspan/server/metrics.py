"""Prometheus metrics: vLLM's names with the prefix `longspan:` in place of `vllm:`.

It owns what is counted and when; what the live page shows of the past is the history's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from longspan.request import FinishReason, RequestOutput, SamplingParams
from longspan.server.history import EndedRequest, FailedRequest, History
from longspan.server.messages import CoreLoad, CoreState

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = tuple(step * 10**power for power in range(7) for step in (1, 2, 5))  # 1 to 5 million
_COMPLETIONS = (1, 2, 5, 10, 20)
_PROMPTS = 1000  # latest ones, of which the prefix cache's hit rate is taken
AnyMetric = TypeVar("AnyMetric", bound=MetricWrapperBase)


@dataclass(frozen=True)
class RequestTimes:
    """What happened to a request, in `time.monotonic()`; None for what did not happen."""

    # when it came
    arrived: float
    # when it ended or was aborted
    ended: float
    # when a step of the core first took it up
    scheduled: float | None = None
    # when its first token came
    first: float | None = None
    # when its last token came
    last: float | None = None


class Metrics:
    """The metrics of one server. `tick` must be called once a second."""

    def __init__(
        self, model: str, pages_per_shard: tuple[int, ...], cache_config: Mapping[str, object] | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._pages = pages_per_shard
        self._waiting = self._gauge("num_requests_waiting", "completions that wait")
        self._running = self._gauge("num_requests_running", "completions that run")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "share of a shard's pages that requests hold", "shard")
        self._preemptions = self._counter("num_preemptions", "preemptions of requests")
        self._drafts = self._counter("spec_decode_num_drafts", "steps of single requests that drafted")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "tokens drafted")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "drafted tokens that were accepted")
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "accepted tokens by position of the draft, from 0", "position"
        )
        self._moved = self._counter(
            "bytes_moved",
            "bytes sent between ranks, by schedule, or tp, pp, ... for what no schedule sends; drafts/... to draft",
            "purpose",
        )
        self._offload = self._counter("kv_offload_pages", "pages offloaded, by what became of them", "event")
        self._transfer = self._counter("kv_transfer", "KV transfers between instances, by what is counted", "what")
        self._restarts = self._counter("engine_restarts", "times the ranks were started again")
        self._prompt = self._counter("prompt_tokens", "prompt tokens of requests that began to generate")
        self._cached = self._counter("prefix_cache_hits", "prompt tokens the prefix cache had")
        self._queried = self._counter("prefix_cache_queries", "prompt tokens looked for in the prefix cache")
        self._output = self._counter("generation_tokens", "tokens generated")
        self._success = self._counter("request_success", "completions that ended", "finished_reason")
        self._errors = self._counter("request_errors", "requests answered with an error", "status")
        self._ttft = self._histogram("time_to_first_token_seconds", "arrival to first token")
        self._itl = self._histogram("inter_token_latency_seconds", "between tokens of a completion")
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "between tokens of a completion, its mean for each request"
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "arrival to end")
        self._queue = self._histogram("request_queue_time_seconds", "arrival to the first step that computes it")
        self._prefill = self._histogram("request_prefill_time_seconds", "that step to the first token")
        self._decode = self._histogram("request_decode_time_seconds", "first token to last token")
        self._inference = self._histogram("request_inference_time_seconds", "the first step to the last token")
        self._prompt_size = self._histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self._output_size = self._histogram("request_generation_tokens", "tokens generated of a completion", _TOKENS)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "tokens generated of a request's longest completion", _TOKENS
        )
        self._wanted = self._histogram("request_params_n", "completions that a request asks for", _COMPLETIONS)
        self._most = self._histogram("request_params_max_tokens", "max_tokens of a request that gives it", _TOKENS)
        self._step_tokens = self._histogram("iteration_tokens_total", "tokens computed in a step", _TOKENS)
        for reason in FinishReason:
            self._success.labels(model, reason.value)
        cache = Info("longspan:cache_config", "the KV cache's options", ["model_name"], registry=self.registry)
        cache.labels(model).info({name: str(value) for name, value in (cache_config or {}).items()})
        self.totals = {"prompt_tokens": 0, "output_tokens": 0, "requests": 0, "prefix_cached_tokens": 0}
        self.load = CoreLoad(used_pages=(0,) * len(pages_per_shard))
        self.history = History()
        # prompt tokens, and those of them that the prefix cache had, of the latest prompts
        self._prompts: deque[tuple[int, int]] = deque(maxlen=_PROMPTS)
        # by counter and labels, what the present core had counted when the counter was last brought up to date
        self._counted: dict[tuple[Counter, tuple[str, ...]], float] = {}

    def resize(self, pages_per_shard: tuple[int, ...]) -> None:
        """Take the number of pages from a core that is ready."""
        self._pages = pages_per_shard

    @property
    def kv_usage(self) -> float:
        """Share of all pages that requests hold."""
        return sum(self.load.used_pages) / sum(self._pages)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the latest prompts' tokens that the prefix cache had; 0 without prompts."""
        return sum(cached for _, cached in self._prompts) / max(1, sum(tokens for tokens, _ in self._prompts))

    def arrived(self, params: SamplingParams) -> None:
        """Count a request that is served."""
        self._wanted.observe(params.n)
        if params.max_tokens is not None:
            self._most.observe(params.max_tokens)

    def step(self, tokens: int) -> None:
        """Count a step that computed so many tokens; 0 is none."""
        if tokens:
            self._step_tokens.observe(tokens)

    def first_token(self, output: RequestOutput, seconds: float) -> None:
        """Count a request's first token, `seconds` after its arrival."""
        prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
        for counter, tokens in ((self._prompt, prompt), (self._queried, prompt), (self._cached, cached)):
            counter.inc(tokens)
        self._prompts.append((prompt, cached))
        self._ttft.observe(seconds)
        self.history.first_token(seconds)
        self.totals["prompt_tokens"] += prompt
        self.totals["prefix_cached_tokens"] += cached

    def tokens(self, count: int, since_last: float | None) -> None:
        """Count `count` tokens of one completion, `since_last` seconds after its previous ones (None: the first)."""
        self._output.inc(count)
        self.totals["output_tokens"] += count
        if since_last is not None:
            for _ in range(count):
                self._itl.observe(since_last / count)
                self.history.next_token(since_last / count)

    def ended(self, output: RequestOutput, times: RequestTimes, core_ids: Sequence[str] = ()) -> None:
        """Count a request that has ended or was aborted; `core_ids` are its completions' in the core."""
        self.totals["requests"] += 1
        prompt = len(output.prompt_token_ids)
        self._prompt_size.observe(prompt)
        sizes = [len(completion.token_ids) for completion in output.outputs]
        self._longest.observe(max(sizes))
        e2e = round(times.ended - times.arrived, 3)
        ttft = None if times.first is None else round(times.first - times.arrived, 3)
        for completion, size, core_id in zip(output.outputs, sizes, core_ids or ("",) * len(sizes), strict=True):
            self._output_size.observe(size)
            reason = (completion.finish_reason or FinishReason.ABORT).value
            self._success.labels(self._model, reason).inc()
            told = EndedRequest(core_id or output.request_id, reason, prompt, output.num_cached_tokens, size, ttft, e2e)
            self.history.ended(told)
        self._e2e.observe(times.ended - times.arrived)
        self._observe_phases(times, max(sizes))

    def _observe_phases(self, times: RequestTimes, tokens: int) -> None:
        scheduled, first, last = times.scheduled, times.first, times.last
        if scheduled is None:
            return
        self._queue.observe(max(0.0, scheduled - times.arrived))
        if first is None or last is None:
            return
        self._prefill.observe(first - scheduled)
        self._decode.observe(last - first)
        self._inference.observe(last - scheduled)
        if tokens > 1:
            self._tpot.observe((last - first) / (tokens - 1))

    def failed(self, request: FailedRequest) -> None:
        """Count a request that was answered with an error."""
        self._errors.labels(self._model, str(request.status)).inc()
        self.history.failed(request)

    def restarted(self) -> None:
        """Count a restart of the core, and reset its load."""
        self._restarts.inc()
        self._counted.clear()
        self.load = CoreLoad(used_pages=(0,) * len(self._pages))

    def tick(self) -> None:
        """Add the time since the last call to the history."""
        self.history.tick(self.totals["output_tokens"], self.totals["prompt_tokens"], self.load.scheduler)

    def render(self, state: CoreState | None) -> bytes:
        """The metrics in Prometheus' text format. `state` is None while there is no core."""
        if state:
            self.load = state.load
            for purpose, moved in state.bytes_by_label.items():
                self._advance(self._moved, moved, purpose)
        counted = self.load.scheduler
        self._waiting.set(counted.waiting)
        self._running.set(counted.running)
        self._advance(self._preemptions, counted.preemptions)
        self._advance(self._drafted, counted.drafted_tokens)
        self._advance(self._accepted, counted.accepted_tokens)
        self._advance(self._drafts, counted.drafts.steps)
        for position, accepted in enumerate(counted.drafts.accepted):
            self._advance(self._accepted_at, accepted, str(position))
        for shard, (used, pages) in enumerate(zip(self.load.used_pages, self._pages, strict=False)):
            self._kv_usage.labels(self._model, str(shard)).set(used / pages)
        for counter, counts in ((self._offload, self.load.offload), (self._transfer, self.load.transfer)):
            for name, count in asdict(counts).items() if counts else ():
                self._advance(counter, count, name)
        return generate_latest(self.registry)

    def _advance(self, counter: Counter, count: float, *labels: str) -> None:
        """Bring a counter to what a core has counted since it started, on top of what earlier cores had counted."""
        before = self._counted.get((counter, labels), 0.0)
        counted = counter.labels(self._model, *labels) if labels else counter
        counted.inc(max(0.0, count - before))
        self._counted[counter, labels] = count

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return self._of_model(
            Gauge(f"longspan:{name}", help_text, ["model_name", *labels], registry=self.registry), labels
        )

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return self._of_model(
            Counter(f"longspan:{name}", help_text, ["model_name", *labels], registry=self.registry), labels
        )

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return self._of_model(
            Histogram(f"longspan:{name}", help_text, ["model_name"], buckets=buckets, registry=self.registry), ()
        )

    def _of_model(self, metric: AnyMetric, labels: tuple[str, ...]) -> AnyMetric:
        """The metric with its model; one with further labels still waits for them."""
        return metric if labels else metric.labels(self._model)
