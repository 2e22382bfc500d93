"""cuDNN's attention on a GPU: with the Triton backend's share it equals the definition of attention in fp64."""

from __future__ import annotations

import pytest
import torch

from longspan.attention.backends.base import BackendShape
from longspan.attention.backends.choice import choose_backend
from longspan.attention.backends.cudnn import CudnnBackend, problem_of_library
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.rows import CacheRows
from longspan.cache.pages import Span
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

pytestmark = pytest.mark.gpu
SHAPE = BackendShape(head_dim=128, value_dim=128, kv_factor=2, quantised=False, dtype=torch.bfloat16)
BLOCKS = (HeadBlock(0, 4, 0, 2),)
SCALE = 0.1
RUNS = {
    "adjacent": QueryRun(0, 2048, (Span(100, 20000),)),
    "two spans": QueryRun(0, 2048, (Span(9000, 5000), Span(100, 5000))),
    "rows are left over": QueryRun(1, 2100, (Span(100, 9000),)),
    "causal": QueryRun(0, 2048, (Span(100, 12000),), causal=True),
    "causal, some rows are computed twice": QueryRun(3, 4000, (Span(100, 16000),), causal=True),
}


@pytest.fixture(scope="module")
def device():
    found = torch.device("cuda")
    assert problem_of_library(found, SHAPE) is None
    return found


@pytest.fixture(scope="module")
def backend(device):
    found = choose_backend("cudnn", "cuda", SHAPE).record.build(device, SHAPE)
    assert isinstance(found, CudnnBackend)
    return found


def rand(device, *shape):
    generator = torch.Generator(device).manual_seed(len(shape))
    return torch.randn(*shape, device=device, generator=generator).to(torch.bfloat16)


def close(found, expected):
    """bf16 results, relative to the largest; logarithms absolutely."""
    assert (found.out.double() - expected.out).abs().max() <= 0.01 * expected.out.abs().max()
    torch.testing.assert_close(found.lse.double(), expected.lse, atol=2e-3, rtol=1e-4, equal_nan=False)


@pytest.mark.parametrize("name", RUNS)
def test_pieces_by_cudnn_and_the_rest_by_triton_are_the_whole(name, backend, device):
    run = RUNS[name]
    rows = run.row + run.length + 1
    q, kv = rand(device, rows, 4, 128), CacheRows(rand(device, 2, 2, 20480, 128))
    found = backend.attend(q, [run], kv, BLOCKS, SCALE)
    exact = TorchBackend(device).attend(q.double(), [run], CacheRows(kv.values.double()), BLOCKS, SCALE)
    close(found, exact)


def test_a_long_diagonal_is_causal(backend, device):
    q, k, v = rand(device, 2048, 4, 128), rand(device, 2048, 2, 128), rand(device, 2048, 2, 128)
    found = backend.causal(q, k, v, BLOCKS, SCALE)
    close(found, TorchBackend(device).causal(q.double(), k.double(), v.double(), BLOCKS, SCALE))
