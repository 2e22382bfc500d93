"""How work is recorded once and repeated: as a CUDA graph, as calls of compiled kernels, or by running it again.

It owns streams and memory pools of recordings on GPUs; it must not know what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longspan.compiled.library import library
from longspan.parallel.collectives import Traffic


class Recorder(Protocol):
    """Records work whose inputs and results keep their addresses."""

    def record(self, work: Callable[[], Tensor], rows: Tensor | None = None) -> Callable[[], Tensor]:
        """Run the work once and record it. The returned function repeats it on the present contents of its inputs.

        `rows` int64 [1] has the number of first rows that are wanted then; others may be left out. None: all are.
        """
        ...


class EagerRecorder:
    """The reference: runs the work again without a graph. As with a graph, the result keeps its address."""

    def record(self, work: Callable[[], Tensor], rows: Tensor | None = None) -> Callable[[], Tensor]:
        """See `Recorder.record`."""
        result = work()
        return lambda: result.copy_(work())


class CudaRecorder:
    """Records CUDA graphs. They share one memory pool, because no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # one for all graphs: cuBLAS keeps a workspace of 32 MiB for each stream

    def record(self, work: Callable[[], Tensor], rows: Tensor | None = None) -> Callable[[], Tensor]:
        """See `Recorder.record`. A first run outside the capture compiles kernels and allocates buffers."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CountedRecorder:
    """Records with `inner`, and counts what the work sends at every replay: a CUDA graph runs no code that counts.

    A recording is no step, so what it sends is not counted. `traffic` has the counts of the rank; the prefix of labels
    is that of the replay.
    """

    def __init__(self, inner: Recorder, traffic: Traffic) -> None:
        self._inner = inner
        self._traffic = traffic

    def record(self, work: Callable[[], Tensor], rows: Tensor | None = None) -> Callable[[], Tensor]:
        """See `Recorder.record`."""
        traffic, sent = self._traffic, Traffic()

        def counted_work() -> Tensor:
            purpose, traffic.prefix = traffic.prefix, ""
            traffic.replace(({}, {}))
            result = work()
            sent.replace(traffic.counts())
            traffic.prefix = purpose
            return result

        before = traffic.counts()
        replay = self._inner.record(counted_work, rows)
        traffic.replace(before)

        def counted_replay() -> Tensor:
            before = traffic.counts()
            result = replay()
            traffic.replace(before)
            for label, count in sent.bytes_by_label.items():
                traffic.count(label, count, sent.calls_by_label[label])
            return result

        return counted_replay


class KernelRecorder:
    """Records the calls of the compiled kernels on a CPU, for steps of up to `most` rows.

    Raises `NotRecordable` if the work computes anything else.
    """

    def __init__(self, most: int) -> None:
        self._most = most

    def record(self, work: Callable[[], Tensor], rows: Tensor | None = None) -> Callable[[], Tensor]:
        """See `Recorder.record`. The work is not run, only its calls are noted."""
        return library().record(work, torch.tensor([self._most]) if rows is None else rows, self._most)
