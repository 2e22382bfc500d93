"""Ranks as threads of this process: the default on a CPU and for one rank on a GPU.

It owns the threads, their queues of plans and their failures. Tensors are passed by reference, and ranks that hold the
same slice of a weight share one copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from longspan.attention.calibrate import combine
from longspan.config import CostConstants
from longspan.engine.cores import share_of_cores, threads_per_rank
from longspan.engine.driver.executors.base import require_open
from longspan.engine.memory_use import MemoryUse
from longspan.engine.rank.build import build_runner, build_vocabulary
from longspan.engine.rank.loading import TensorStore
from longspan.engine.rank.runner import Runner
from longspan.engine.rank.steps import StepLoop
from longspan.engine.setup import EngineSetup
from longspan.errors import LongspanError, WorkerDied
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric
from longspan.parallel.trace import Trace, TraceSpan
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult

_POLL_SECONDS = 0.2
_STOP_SECONDS = 5.0  # until the threads are left behind, if one of them hangs
_Outcome = StepResult | BaseException


class ThreadExecutor:
    """See `Executor`. Every rank is a thread."""

    def __init__(self, setup: EngineSetup) -> None:
        size = setup.grid.world_size
        self.setup = setup
        self._closed = False
        self._hangs = False  # whether a thread may never end
        self._fabric = ThreadFabric(size)
        self._traffic = [Traffic(trace=Trace(setup.config.trace, setup.device())) for _ in range(size)]
        self._inboxes: list[SimpleQueue[StepPlan | None]] = [SimpleQueue() for _ in range(size)]  # None ends a rank
        self._outcomes: SimpleQueue[tuple[int, _Outcome]] = SimpleQueue()  # with the rank
        self._done: list[deque[StepResult]] = [deque() for _ in range(size)]  # results of each rank, not collected yet
        self._store = TensorStore.of(setup, setup.device())
        self._vocabulary = build_vocabulary(setup)
        self._measured: list[CostConstants] = []
        self._runners: dict[int, Runner] = {}
        self._memory: MemoryUse | None = None  # the same number of pages on all ranks
        self._threads = [
            Thread(target=self._serve, args=(rank,), name=f"longspan-rank-{rank}", daemon=True) for rank in range(size)
        ]
        for thread in self._threads:
            thread.start()
        self.collect(lambda: None)  # every rank reports an empty result once it is ready
        self.constants = combine(self._measured) if self._measured else None
        self.setup = setup.with_memory(self._memory)

    @property
    def runners(self) -> list[Runner]:
        """The runner of each rank, in rank order."""
        return [self._runners[rank] for rank in sorted(self._runners)]

    def submit(self, plan: StepPlan) -> None:
        """See `Executor.submit`."""
        require_open(self._closed)
        for inbox in self._inboxes:
            inbox.put(plan)

    def collect(self, while_waiting: Callable[[], None]) -> StepResult:
        """See `Executor.collect`. The first failure of a rank ends all ranks and is raised."""
        require_open(self._closed)
        while not all(self._done):
            try:
                rank, outcome = self._outcomes.get(timeout=_POLL_SECONDS)
            except Empty:
                self._call(while_waiting)
                continue
            if isinstance(outcome, BaseException):
                self.shutdown()
                if isinstance(outcome, LongspanError):
                    raise outcome
                raise WorkerDied(f"rank {rank} failed: {type(outcome).__name__}: {outcome}") from outcome
            self._done[rank].append(outcome)
        return StepResult.joined([done.popleft() for done in self._done])

    def check(self) -> None:
        """See `Executor.check`."""
        require_open(self._closed)

    def late(self) -> str | None:
        """See `Executor.late`."""
        return None

    def traffic(self) -> Traffic:
        """See `Executor.traffic`."""
        total = Traffic()
        for traffic in self._traffic:
            total.add(traffic)
        return total

    def trace(self) -> dict[int, list[TraceSpan]]:
        """See `Executor.trace`."""
        return {rank: list(traffic.trace.spans) for rank, traffic in enumerate(self._traffic)}

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        self._closed = True
        self._fabric.abort()
        for inbox in self._inboxes:
            inbox.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()) if self._hangs else None)

    def _call(self, while_waiting: Callable[[], None]) -> None:
        try:
            while_waiting()
        except BaseException:
            self._hangs = True  # a thread cannot be killed, so `shutdown` must not wait for it without a limit
            self.shutdown()
            raise

    def _serve(self, rank: int) -> None:
        """The main function of a rank's thread."""
        torch.set_num_threads(threads_per_rank(self.setup.config))
        try:
            built = build_runner(self.setup, rank, self._store, self._vocabulary, lambda group: self._open(group, rank))
            self._traffic[rank].reset()  # the calibration's traffic does not count
            runner = self._runners[rank] = built.runner
            if built.constants:
                self._measured.append(built.constants)
            self._memory = built.memory
            self._outcomes.put((rank, StepResult()))
        except BaseException as error:
            self._outcomes.put((rank, error))
            return
        inbox = self._inboxes[rank]

        def answer(outcome: _Outcome) -> None:
            self._outcomes.put((rank, outcome))

        loop = StepLoop(runner, answer, answer)
        while (plan := inbox.get()) is not None:
            try:
                torch.set_num_threads(self._threads_for(rank, plan))
                loop.take(plan)
            except BaseException as error:
                answer(error)
        loop.close()
        runner.close()

    def _threads_for(self, rank: int, plan: StepPlan) -> int:
        """The number of torch's threads for a rank in a step.

        If the user has not set it, ranks with tokens in this step share the cores, and the others keep their own share.
        """
        grid = self.setup.grid
        busy = {segment.pcp for segment in plan.segments}
        if self.setup.config.num_threads or grid.ranks[rank].pcp not in busy:
            return threads_per_rank(self.setup.config)
        return share_of_cores(sum(place.pcp in busy for place in grid.ranks))

    def _open(self, group: Sequence[int], rank: int) -> Collectives:
        return ThreadedCollectives(self._fabric, group, rank, self._traffic[rank])
