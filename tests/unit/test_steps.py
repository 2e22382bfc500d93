"""The loop over steps on a rank with a device that computes while the host goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread

import msgspec
import pytest
import torch
import zmq

from longspan.engine.rank.serving import Answers, carry_out_plans
from longspan.engine.rank.steps import StepLoop
from longspan.engine.transport import messages
from longspan.parallel.collectives import Traffic
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult

SECONDS = 5.0  # until a wait for another thread counts as one for ever


def plan(step: int) -> StepPlan:
    return StepPlan(step, (), (), (), (), (), (), ("local",), ("local",))


def result(step: int) -> StepResult:
    """A result that names its step."""
    return StepResult(failed_loads=(step,))


class Device:
    """A runner whose steps are done when the test says so."""

    device = torch.device("cpu")

    def __init__(self, is_asynchronous: bool = True) -> None:
        self.is_asynchronous = is_asynchronous
        self.launched: list[Event] = [Event() for _ in range(20)]
        self.done: list[Event] = [Event() for _ in range(20)]
        self.broken: set[int] = set()

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.launched[plan.step].set()

        def finish() -> StepResult:
            assert self.done[plan.step].wait(SECONDS), f"step {plan.step} was awaited before it was done"
            if plan.step in self.broken:
                raise RuntimeError(f"step {plan.step} is broken")
            return result(plan.step)

        return finish


class Answered:
    """What a loop has answered, in order."""

    def __init__(self) -> None:
        self.outcomes: list[StepResult | BaseException] = []
        self.arrived: list[Event] = [Event() for _ in range(20)]

    def put(self, outcome: StepResult | BaseException) -> None:
        self.outcomes.append(outcome)
        self.arrived[len(self.outcomes) - 1].set()

    def wait_for(self, count: int) -> None:
        assert self.arrived[count - 1].wait(SECONDS), f"{len(self.outcomes)} answers of {count}"


def test_the_next_step_is_launched_before_the_result_of_the_present_one_is_there():
    """A driver with two steps in flight: the answer to one brings the plan after the next."""
    device, answered = Device(), Answered()
    loop = StepLoop(device, answered.put, answered.put)
    loop.take(plan(0))
    loop.take(plan(1))
    for step in range(8):
        device.done[step].set()
        answered.wait_for(step + 1)  # while step + 1 is computed
        loop.take(plan(step + 2))
        assert device.launched[step + 2].is_set()
        assert not device.done[step + 1].is_set()
    for done in device.done:
        done.set()
    loop.close()
    assert answered.outcomes == [result(step) for step in range(10)]


def test_a_failed_step_is_answered_with_its_error_and_the_loop_can_be_closed():
    device, answered = Device(), Answered()
    device.broken = {1}
    loop = StepLoop(device, answered.put, answered.put)
    for done in device.done:
        done.set()
    for step in range(8):
        loop.take(plan(step))
    loop.close()
    assert [str(outcome) for outcome in answered.outcomes if outcome != result(answered.outcomes.index(outcome))] == [
        "step 1 is broken"
    ]


def test_few_steps_are_in_flight_since_each_holds_pinned_memory():
    device, answered = Device(), Answered()
    loop = StepLoop(device, answered.put, answered.put)
    taking = Thread(target=lambda: [loop.take(plan(step)) for step in range(12)], daemon=True)
    taking.start()
    assert device.launched[3].wait(SECONDS)
    assert not device.launched[4].wait(0.05)
    for done in device.done:
        done.set()
    taking.join(SECONDS)
    loop.close()
    assert answered.outcomes == [result(step) for step in range(12)]


def test_without_a_gpu_a_step_is_answered_before_the_next_is_taken():
    device, answered = Device(is_asynchronous=False), Answered()
    device.done[0].set()
    StepLoop(device, answered.put, answered.put).take(plan(0))
    assert answered.outcomes == [result(0)]


class Connection:
    """A rank in a thread, and its driver's end of the connection."""

    def __init__(self, device: Device) -> None:
        self.context = zmq.Context()
        self.driver = self.context.socket(zmq.PAIR)
        self.driver.bind("inproc://driver")
        self.driver.rcvtimeo = int(SECONDS * 1e3)
        self.errors: list[BaseException] = []
        self._device = device
        self.rank = Thread(target=self._serve, daemon=True)
        self.rank.start()

    def send(self, *sent: bytes) -> None:
        for message in sent:
            self.driver.send(message)

    def receive(self) -> messages.FromWorker:
        return msgspec.msgpack.decode(self.driver.recv(), type=messages.FromWorker)

    def _serve(self) -> None:
        socket, answers = self.context.socket(zmq.PAIR), Answers(self.context)
        socket.connect("inproc://driver")
        try:
            carry_out_plans(self._device, 0, Traffic({"tp": 7}, {"tp": 1}), socket, answers)
        except BaseException as error:
            self.errors.append(error)
        answers.close()
        socket.close(linger=1000)


@pytest.fixture(params=[True, False], ids=["device", "cpu"])
def connection(request) -> Iterator[Connection]:
    connection = Connection(Device(request.param))
    yield connection
    connection.rank.join(SECONDS)
    assert not connection.rank.is_alive()
    connection.driver.close(linger=0)
    connection.context.term()


def test_a_rank_answers_its_driver_in_order_whatever_waits_for_the_results(connection):
    for done in connection._device.done:
        done.set()
    connection.send(*(plan(step).encode() for step in range(6)), messages.PROBE)
    assert [connection.receive() for _ in range(6)] == [messages.StepDone(result(step)) for step in range(6)]
    connection.send(messages.TRAFFIC, messages.TRACE)
    assert connection.receive() == messages.TrafficReport({"tp": 7}, {"tp": 1})
    assert connection.receive() == messages.TraceReport(0, [])
    connection.send(messages.STOP)
    connection.rank.join(SECONDS)
    assert not connection.errors


def test_an_error_in_a_result_ends_the_rank_with_that_error(connection):
    for done in connection._device.done:
        done.set()
    connection._device.broken = {1}
    connection.send(plan(0).encode(), plan(1).encode())
    assert connection.receive() == messages.StepDone(result(0))
    connection.rank.join(SECONDS)
    assert [str(error) for error in connection.errors] == ["step 1 is broken"]
