"""Long prefills by cuDNN: what is divided from a step is computed once, whoever computes it."""

from __future__ import annotations

import pytest
import torch

from longspan.attention.backends.base import BackendShape
from longspan.attention.backends.choice import choose_backend
from longspan.attention.backends.cudnn import CudnnBackend, LibraryUse, divide
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.reference import ReferenceBackend
from longspan.attention.rows import CacheRows
from longspan.attention.state import merge
from longspan.cache.pages import Span
from longspan.errors import ConfigError
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

SMALL = LibraryUse(rows=8, row_multiple=4, columns=16, most_columns=32, spans=3)
ONE_BLOCK = (HeadBlock(0, 4, 0, 2),)
TWO_BLOCKS = (HeadBlock(0, 1, 0, 1), HeadBlock(1, 4, 1, 2))


class Library:
    """What the library computes, in the dtype of q. It remembers the sizes of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, causal, scale):
        self.calls.append((q.shape[2], k.shape[2], causal))
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ v.repeat_interleave(group, 1), scores.logsumexp(-1)[..., None]


class Inner(TorchBackend):
    def merge(self, parts, dtype=None):
        return merge(parts)


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found.out, expected.out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-12, rtol=1e-12)


RUNS = {  # runs, and the calls (rows, columns, causal) that the library gets
    "one run": ([QueryRun(0, 8, (Span(5, 48),))], [(8, 32, False), (8, 16, False)]),
    "columns left over": ([QueryRun(0, 8, (Span(5, 53),))], [(8, 32, False), (8, 16, False)]),
    "rows are padded": ([QueryRun(0, 10, (Span(5, 40),))], [(12, 32, False)]),
    "scattered": ([QueryRun(0, 8, (Span(70, 9), Span(5, 9)))], [(8, 16, False)]),
    "causal": ([QueryRun(0, 8, (Span(3, 27),), causal=True)], [(8, 16, False), (8, 8, True)]),
    "causal, nothing before": ([QueryRun(0, 8, (Span(3, 8),), causal=True)], [(8, 8, True)]),
    "causal with padding": ([QueryRun(0, 9, (Span(3, 30),), causal=True)], [(12, 16, False)]),
    "causal beside a decode row": (
        [QueryRun(0, 1, (Span(80, 9),)), QueryRun(1, 8, (Span(3, 24),), causal=True), QueryRun(10, 2, (Span(50, 5),))],
        [(8, 16, False), (8, 8, True)],
    ),
    "more than one long run": ([QueryRun(0, 8, (Span(3, 16),)), QueryRun(9, 8, (Span(40, 17),))], [(8, 16, False)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("blocks", [ONE_BLOCK, TWO_BLOCKS])
@pytest.mark.parametrize("name", RUNS)
def test_pieces_and_the_rest_are_the_whole(name, blocks):
    runs, calls = RUNS[name]
    rows = max(run.row + run.length for run in runs)
    q, kv = rand(rows, 4, 16), CacheRows(rand(2, 2, 90, 16))
    library = Library()
    found = CudnnBackend(Inner(q.device), library, SMALL).attend(q, runs, kv, blocks, 0.3)
    close(found, ReferenceBackend().attend(q, runs, kv, blocks, 0.3))
    assert library.calls == [call for call in calls for _ in blocks]


LEFT = {
    "few rows": QueryRun(0, 7, (Span(0, 64),)),
    "few columns": QueryRun(0, 8, (Span(0, 15),)),
    "a window": QueryRun(0, 8, (Span(0, 64),), (0,) * 8),
    "many spans": QueryRun(0, 8, tuple(Span(10 * n, 4) for n in range(8))),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_does_not_pay_is_left_as_it_is(name):
    assert divide([LEFT[name]], SMALL) == ([], [LEFT[name]])


@pytest.mark.parametrize("segments", [[(0, 8)], [(0, 8), (8, 3)], [(1, 5), (7, 12)], [(2, 8)]], ids=str)
def test_diagonals_of_long_segments_are_the_librarys(segments):
    rows = segments[-1][0] + segments[-1][1]
    q, k, v = rand(rows, 4, 16), rand(rows, 2, 16, 1)[..., 0], rand(rows, 2, 16)
    library = Library()
    backend = CudnnBackend(Inner(q.device), library, SMALL)
    found = backend.prepare_diagonal(segments, rows, None).attend(q, k, v, ONE_BLOCK, 0.3)
    close(found, TorchBackend(q.device).prepare_diagonal(segments, rows, None).attend(q, k, v, ONE_BLOCK, 0.3))
    assert library.calls == [(length, length, True) for _, length in segments if length in (8, 12)]


def test_a_diagonal_with_a_window_is_not_the_librarys():
    q, k = rand(8, 4, 16), rand(8, 2, 16)
    backend = CudnnBackend(Inner(q.device), Library(), SMALL)
    found = backend.prepare_diagonal([(0, 8)], 8, 3).attend(q, k, k, ONE_BLOCK, 0.3)
    close(found, TorchBackend(q.device).prepare_diagonal([(0, 8)], 8, 3).attend(q, k, k, ONE_BLOCK, 0.3))


GQA = {"head_dim": 128, "value_dim": 128, "kv_factor": 2, "quantised": False, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kv_factor": 1}, "not latents"),
        ({"head_dim": 256}, "up to 128"),
        ({"head_dim": 100}, "multiples of 8"),
        ({"dtype": torch.float32}, "computes in bfloat16 or float16"),
        ({"quantised": True}, "a scale for each row"),
    ],
)
def test_what_the_library_cannot_compute_is_said(changes, problem, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=problem):
        choose_backend("cudnn", "cuda", BackendShape(**{**GQA, **changes}), is_installed=lambda package: True)


def test_auto_does_not_choose_it_yet(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert choose_backend("auto", "cuda", BackendShape(**GQA), is_installed=lambda package: True).name == "triton"
