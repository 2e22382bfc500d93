"""What Prometheus is told: counts only grow, whatever becomes of the core that counted."""

from longspan.scheduler.scheduler import SchedulerCounters
from longspan.server.messages import CoreLoad, CoreState
from longspan.server.metrics import Metrics


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
