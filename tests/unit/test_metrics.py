"""What Prometheus, the live page and the log are told of a server's work."""

import logging
import re
import time

from longspan.request import CompletionOutput, FinishReason, RequestOutput
from longspan.scheduler.acceptance import DraftCounts
from longspan.scheduler.counters import SchedulerCounters
from longspan.server.history import History
from longspan.server.logs import ThroughputLog
from longspan.server.messages import CoreLoad, CoreState
from longspan.server.metrics import Metrics, RequestTimes

PHASES = (
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
)  # fmt: skip


def state(preemptions: int, sent: int) -> CoreState:
    """What a core tells that has counted so much."""
    load = CoreLoad((0,), SchedulerCounters(preemptions=preemptions))
    return CoreState(load, (0,), [], [], {"gather_q": sent, "tp": 7})


def told(metrics: Metrics, core: CoreState | None) -> dict[str, float]:
    """The samples by name and labels."""
    lines = [line for line in metrics.render(core).decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_counts_of_a_core_that_is_gone_are_kept():
    metrics = Metrics("m", (4,))
    preempted = 'longspan:num_preemptions_total{model_name="m"}'
    moved = 'longspan:bytes_moved_total{model_name="m",purpose="gather_q"}'
    seen = [told(metrics, state(2, 100)), told(metrics, state(2, 150))]
    metrics.restarted()
    seen += [told(metrics, None), told(metrics, state(1, 30))]
    assert [samples[preempted] for samples in seen] == [2, 2, 2, 3]
    assert [samples[moved] for samples in seen] == [100, 150, 150, 180]


def test_what_no_schedule_sends_has_a_purpose_of_its_own():
    assert told(Metrics("m", (4,)), state(0, 0))['longspan:bytes_moved_total{model_name="m",purpose="tp"}'] == 7


def test_accepted_drafts_are_told_by_position_and_counts_of_a_core_that_is_gone_are_kept():
    metrics = Metrics("m", (4,))
    drafts = DraftCounts.of_step(3, 2).plus(DraftCounts.of_step(2, 1))
    core = CoreState(CoreLoad((0,), SchedulerCounters(drafts=drafts)), (0,), [], [], {})
    told(metrics, core)
    metrics.restarted()
    samples = told(metrics, core)
    of_position = 'longspan:spec_decode_num_accepted_tokens_per_pos_total{{model_name="m",position="{}"}}'
    assert [samples.get(of_position.format(position)) for position in range(3)] == [4, 2, None]
    assert samples['longspan:spec_decode_num_drafts_total{model_name="m"}'] == 4


def ended(metrics: Metrics, times: RequestTimes, tokens: int = 5) -> dict[str, float]:
    """The samples after a request with one completion of so many tokens."""
    completion = CompletionOutput(0, token_ids=list(range(tokens)), finish_reason=FinishReason.STOP)
    metrics.ended(RequestOutput("r0", None, [1, 2, 3], [completion]), times)
    return told(metrics, None)


def test_the_phases_of_a_request_are_between_its_times():
    samples = ended(Metrics("m", (4,)), RequestTimes(arrived=10, scheduled=11, first=13, last=17, ended=18))
    assert {name: samples[f'longspan:{name}_sum{{model_name="m"}}'] for name in PHASES} == {
        "request_queue_time_seconds": 1, "request_prefill_time_seconds": 2, "request_decode_time_seconds": 4,
        "request_inference_time_seconds": 6, "e2e_request_latency_seconds": 8,
        "request_time_per_output_token_seconds": 1,
    }  # fmt: skip


def test_a_request_that_never_ran_has_no_phases():
    samples = ended(Metrics("m", (4,)), RequestTimes(arrived=10, ended=18), tokens=0)
    counts = {name: samples[f'longspan:{name}_count{{model_name="m"}}'] for name in PHASES}
    assert counts == dict.fromkeys(PHASES, 0) | {"e2e_request_latency_seconds": 1}


def test_every_count_is_there_before_the_first_request():
    samples = told(Metrics("m", (4,), {"block_size": 16}), None)
    for name in ("generation_tokens_total", "prefix_cache_queries_total", "iteration_tokens_total_count"):
        assert samples[f'longspan:{name}{{model_name="m"}}'] == 0
    assert samples['longspan:request_success_total{finished_reason="abort",model_name="m"}'] == 0
    assert samples['longspan:cache_config_info{block_size="16",model_name="m"}'] == 1


def test_the_page_gets_median_and_p95_of_the_last_two_minutes_only():
    history = History()
    assert history.quantiles() == ((None, None), (None, None))
    for seconds in range(1, 101):
        history.first_token(seconds)
    assert history.quantiles()[0] == (50, 95)
    assert history.quantiles(time.monotonic() + 121)[0] == (None, None)


def test_throughput_is_logged_while_there_is_work_only(caplog):
    caplog.set_level(logging.INFO, "longspan.server")
    metrics = Metrics("m", (4, 4))
    log = ThroughputLog(metrics, interval=1e-9)
    log.tick()
    assert caplog.messages == []
    metrics.load = CoreLoad((2, 1), SchedulerCounters(waiting=3, running=2))
    metrics.first_token(RequestOutput("r0", None, [0] * 40, [], num_cached_tokens=10), 0.5)
    log.tick()
    (line,) = caplog.messages
    assert re.fullmatch(
        r"Avg prompt throughput: [\d.]+ tokens/s, Avg generation throughput: 0\.0 tokens/s, Running: 2 reqs, "
        r"Waiting: 3 reqs, KV cache usage: 37\.5%, Prefix cache hit rate: 25\.0%",
        line,
    )
    metrics.load = CoreLoad((0, 0))
    log.tick()
    assert len(caplog.messages) == 1


def test_throughput_is_logged_once_in_ten_seconds(caplog):
    caplog.set_level(logging.INFO, "longspan.server")
    metrics = Metrics("m", (4,))
    metrics.load = CoreLoad((2,), SchedulerCounters(running=2))
    ThroughputLog(metrics).tick()
    assert caplog.messages == []
