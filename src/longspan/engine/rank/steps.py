"""The loop over steps on one rank. On a GPU this thread only launches; a second one waits for results and answers.

It owns the order of answers and the number of steps in flight; it must not know how plans and results are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Semaphore, Thread

import torch

from longspan.engine.rank.runner import Finish, Runner
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult

_MOST_IN_FLIGHT = 4  # more than a driver submits at once; each step in flight holds pinned memory


class StepLoop:
    """Runs plans in order. `answer` is called with each step's result, `fail` with what `Finish` raises.

    On a GPU another thread calls both, so that the next step is launched while this one is computed: one thread that
    did everything would wait for the newest step while the next plan arrives, and the device would idle.
    """

    def __init__(
        self, runner: Runner, answer: Callable[[StepResult], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._runner = runner
        self._answer = answer
        self._fail = fail
        self._room = Semaphore(_MOST_IN_FLIGHT)
        self._launched: SimpleQueue[Finish | None] = SimpleQueue()  # None ends the thread
        self._finisher: Thread | None = None
        if runner.is_asynchronous:
            self._finisher = Thread(target=self._finish_steps, name="longspan-finisher", daemon=True)
            self._finisher.start()

    def take(self, plan: StepPlan) -> None:
        """Start a plan. Waits only while too many steps are in flight, or where there is no GPU for the result.

        Raises what goes wrong before the step is launched.
        """
        if self._finisher is None:
            self._answer(self._runner.start(plan)())
            return
        self._room.acquire()
        try:
            finish = self._runner.start(plan)
        except BaseException:
            self._room.release()
            raise
        self._launched.put(finish)

    def close(self) -> None:
        """Answer the steps in flight, and end the thread."""
        if self._finisher is not None:
            self._launched.put(None)
            self._finisher.join()

    def _finish_steps(self) -> None:
        """The main function of the thread. After a failure it goes on: what takes plans must not wait for ever."""
        if self._runner.device.type == "cuda":  # a thread starts on GPU 0, where waiting would open a CUDA context
            torch.cuda.set_device(self._runner.device)
        while (finish := self._launched.get()) is not None:
            try:
                self._answer(finish())
            except BaseException as error:
                self._fail(error)
            finally:
                self._room.release()
