"""How long a step may take, by a clock that the test sets."""

from __future__ import annotations

import pytest

from longspan.config import LivenessConfig
from longspan.engine.driver.step_watch import StepWatch
from longspan.engine.transport.heartbeat import SilenceTimer
from longspan.errors import ConfigError, StepTimeout


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(clock: Clock, warm: bool = True, seconds: float = 0.1, **liveness: float) -> StepWatch:
    """A watch that has measured eight steps of ten tokens, each so many seconds long."""
    made = StepWatch(LivenessConfig(**liveness), clock)
    for _ in range(8 if warm else 0):
        made.measured(10, seconds)
    return made


def test_no_step_is_too_long_before_eight_were_measured():
    clock = Clock()
    watched = watch(clock, warm=False, step_timeout=1)
    for _ in range(7):
        watched.measured(10, 0.1)
    watched.begin()
    clock.now = 1e6
    watched.check()
    watched.end()
    watched.measured(10, 0.1)
    watched.begin()
    clock.now += 1.5
    with pytest.raises(StepTimeout):
        watched.check()


def test_a_step_may_take_a_minute_however_fast_others_were():
    clock = Clock()
    watched = watch(clock)
    watched.begin()
    watched.wait_for(41, 10)
    clock.now = 60.0
    watched.check()
    clock.now = 60.5
    with pytest.raises(StepTimeout, match=r"step 41 \(10 tokens\) has not ended after 60\.5 s.*limit is 60\.0 s"):
        watched.check()


def test_a_step_may_take_twenty_times_what_the_slowest_of_the_last_let_expect():
    clock = Clock()
    watched = watch(clock)
    watched.measured(1, 5.0)  # seconds a token
    watched.begin()
    watched.wait_for(0, 100)
    clock.now = 20 * 5.0 * 100
    watched.check()
    clock.now += 1
    with pytest.raises(StepTimeout):
        watched.check()


def test_one_slow_step_is_forgotten_after_64_others():
    watched = watch(Clock())
    watched.measured(1, 1000.0)
    assert watched.limit(1) == 20_000
    for _ in range(64):
        watched.measured(10, 0.1)
    assert watched.limit(1) == 60


@pytest.mark.parametrize("timeout", [0.5, 7200.0])
def test_a_given_limit_is_the_limit_whatever_was_measured(timeout):
    clock = Clock()
    watched = watch(clock, seconds=100.0, step_timeout=timeout)
    watched.begin()
    watched.wait_for(3, 10)
    clock.now = timeout
    watched.check()
    clock.now += 0.1
    with pytest.raises(StepTimeout, match="raise --step-timeout"):
        watched.check()


def test_every_result_starts_the_clock_anew_and_none_runs_between_steps():
    clock = Clock()
    watched = watch(clock)
    for _ in range(3):  # as with steps in flight: no result takes long, all together do
        watched.begin()
        watched.wait_for(0, 10)
        clock.now += 50
        watched.check()
        watched.end()
    clock.now += 1e6
    watched.check()


def test_an_engine_after_one_that_hung_has_limits_from_the_start():
    watched = watch(Clock(), warm=False, pace=5.0)
    assert (watched.pace, watched.limit(1), watched.limit(2)) == (5.0, 100.0, 200.0)


def test_a_short_limit_begins_after_the_warm_up_of_an_engine_after_one_that_hung():
    watched = watch(Clock(), warm=False, pace=5.0, step_timeout=2)
    assert watched.limit(1) == 60
    for _ in range(8):
        watched.measured(10, 0.1)
    assert watched.limit(1) == 2


def test_steps_without_tokens_measure_nothing():
    watched = watch(Clock(), warm=False)
    for _ in range(100):
        watched.measured(0, 1.0)
    assert watched.pace is None


def test_a_message_resets_the_silence():
    clock = Clock()
    silence = SilenceTimer(clock)
    for clock.now in (0.4, 0.8, 1.2):
        silence.update()
    assert silence.seconds == pytest.approx(1.2)
    silence.reset()
    assert silence.seconds == 0


def test_time_in_which_the_timer_was_not_updated_is_no_silence():
    clock = Clock()
    silence = SilenceTimer(clock)
    clock.now = 3600.0
    assert silence.update() == 1.0


@pytest.mark.parametrize("field", ["step_timeout", "heartbeat_interval", "heartbeat_timeout"])
def test_seconds_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field}=0: must be positive"):
        LivenessConfig(**{field: 0})
