"""Ranks as threads of this process: the default on a CPU and for one rank on a GPU.

It owns the threads, their queues of plans and their failures. Tensors are passed by reference, and ranks that hold the
same slice of a weight share one copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from threading import Barrier, Thread

import torch

from longspan.attention.calibrate import combine
from longspan.config import CostConstants, SchedulerConfig
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
from longspan.parallel.grid import Grid
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric
from longspan.parallel.trace import Trace, TraceSpan
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult

_POLL_SECONDS = 0.2
_STOP_SECONDS = 5.0  # until the threads are left behind, if one of them hangs
_Outcome = StepResult | BaseException
# torch's threads, what is called, and where what it raised is put
_WideCall = tuple[int, Callable[[], None], SimpleQueue[BaseException | None]]


class ThreadExecutor:
    """See `Executor`. Every rank is a thread."""

    def __init__(self, setup: EngineSetup) -> None:
        size = setup.grid.world_size
        self.setup = setup
        self._closed = False
        self._hangs = False  # whether a thread may never end
        self._fabric = ThreadFabric(size)
        self._traffic = [Traffic(trace=Trace(setup.config.trace, setup.device())) for _ in range(size)]
        self._step_starts = _step_starts(setup.grid, setup.config.scheduler)
        self._wide = _WideThread()
        self._inboxes: list[SimpleQueue[StepPlan | None]] = [SimpleQueue() for _ in range(size)]  # None ends a rank
        self._outcomes: SimpleQueue[tuple[int, _Outcome]] = SimpleQueue()  # with the rank
        self._done: list[deque[StepResult]] = [deque() for _ in range(size)]  # results of each rank, not collected yet
        self._store = TensorStore.of(setup, setup.device())
        self.vocabulary = build_vocabulary(setup)  # for grammars, shared by all ranks
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
        for start in self._step_starts:
            start.abort()
        for inbox in self._inboxes:
            inbox.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()) if self._hangs else None)
        self._wide.close(max(0.0, deadline - time.monotonic()))

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
            built = build_runner(self.setup, rank, self._store, self.vocabulary, lambda group: self._open(group, rank))
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
                if self._step_starts:
                    self._step_starts[rank].wait()
                self._compute(self._threads_for(rank, plan), partial(loop.take, plan))
            except BaseException as error:
                answer(error)
        loop.close()
        runner.close()

    def _compute(self, threads: int, call: Callable[[], None]) -> None:
        """Call with a number of torch's threads: all cores are used by one thread of this process, whosever step it is.

        OpenMP keeps the threads of every thread that has computed with several. With more of them than cores it lets
        them sleep between two operations, and waking them costs more than many an operation of a decode step.
        """
        is_alone = threads == share_of_cores(1) > threads_per_rank(self.setup.config)
        if is_alone and self.setup.device_type == "cpu":
            self._wide.run(threads, call)
        else:
            torch.set_num_threads(threads)
            call()

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


class _WideThread:
    """A thread that makes calls for others, one at a time, with several of torch's threads."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_WideCall | None] = SimpleQueue()  # None ends the thread
        self._thread = Thread(target=self._serve, name="longspan-wide", daemon=True)
        self._thread.start()

    def run(self, threads: int, call: Callable[[], None]) -> None:
        """Wait for a call. Raises what it raises."""
        ended: SimpleQueue[BaseException | None] = SimpleQueue()  # of this call: another rank may wait for its own
        self._calls.put((threads, call, ended))
        if error := ended.get():
            raise error

    def close(self, seconds: float) -> None:
        """End the thread after its call, and wait for it: Python aborts a process whose thread ends while it exits."""
        self._calls.put(None)
        self._thread.join(seconds)

    def _serve(self) -> None:
        while (wanted := self._calls.get()) is not None:
            threads, call, ended = wanted
            torch.set_num_threads(threads)
            try:
                call()
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)


def _step_starts(grid: Grid, scheduler: SchedulerConfig) -> list[Barrier]:
    """For each rank, what the ranks of its context group wait at before each step; empty if steps never overlap.

    A rank may read pages of another one in place, until the end of a step, and the other's next step may write to them.
    """
    if not scheduler.async_scheduling and grid.pp == 1:
        return []
    made = {group: Barrier(len(group)) for group in map(grid.context_group, range(grid.world_size))}
    return [made[grid.context_group(rank)] for rank in range(grid.world_size)]
