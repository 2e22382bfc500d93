"""A trace on a GPU shows when the device worked, not when work was launched."""

from __future__ import annotations

import time

import pytest
import torch

from longspan.parallel.trace import COMPUTE, Trace

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
CYCLES = 50_000_000  # tens of milliseconds


def test_a_span_has_the_time_of_the_device() -> None:
    trace = Trace(True, DEVICE)
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    started = time.perf_counter()
    with trace.span("sleep", COMPUTE):
        torch.cuda._sleep(CYCLES)
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    taken = time.perf_counter() - started
    (span,) = trace.spans
    assert launched < span.stop - span.start <= taken
    assert started - 1e-3 <= span.start and span.stop <= started + taken + 1e-3


def test_what_is_captured_has_no_span() -> None:
    trace, x = Trace(True, DEVICE), torch.zeros(1, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), trace.span("add", COMPUTE):
        x += 1
    graph.replay()
    torch.cuda.synchronize()
    assert float(x) == 1
    assert not trace.spans
