"""The one stopwatch: what counts and what does not, on a clock that the tests move."""

from types import SimpleNamespace

import pytest
import torch

from longspan import clock


class Time:
    """Seconds that pass only when something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def passes(self, seconds: float):
        """A run that takes so long."""

        def run() -> None:
            self.now += seconds

        return run


@pytest.fixture
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_a_run_takes_what_passes_during_it(time):
    assert clock.seconds(time.passes(2.0)) == 2.0


def test_what_comes_before_each_repetition_does_not_count(time):
    assert clock.repeated(time.passes(2.0), 3, before=time.passes(10.0)) == [2.0] * 3
    assert time.now == 36.0


def test_a_function_is_warmed_up_before_runs_count(time):
    taken = iter([0.5, *[0.4] * 3, 0.25, 0.125, 0.375])
    timing = clock.Clock(0.0).time(lambda: time.passes(next(taken))())
    assert (timing.median, timing.best, timing.runs, timing.captured) == (0.25, 0.125, 3, False)


def test_a_function_that_takes_a_second_is_not_warmed_up_again(time):
    calls: list[None] = []
    clock.make_clock(torch.device("cpu"), 0.0).time(lambda: calls.append(time.passes(1.0)()))
    assert len(calls) == 1 + 3
