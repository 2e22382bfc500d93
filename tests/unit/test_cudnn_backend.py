"""Long prefills by cuDNN: what is divided from a step is computed once, whoever computes it."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from unittest.mock import Mock

import pytest
import torch

from longspan.attention.backends import cudnn
from longspan.attention.backends.base import Backend, BackendShape, RecordableBackend
from longspan.attention.backends.choice import choose_backend
from longspan.attention.backends.cudnn import BACKEND, CudnnBackend
from longspan.attention.backends.cudnn_blocks import LibraryUse, divide, row_blocks
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.backends.reference import ReferenceBackend
from longspan.attention.rows import CacheRows
from longspan.attention.state import merge
from longspan.cache.pages import Span
from longspan.errors import ConfigError
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

pytest.importorskip("triton")
from longspan.attention.backends.triton.backend import TritonBackend

SMALL = LibraryUse(rows=(8, 16), columns=(16, 32), spans=3)
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
    "rows left over": ([QueryRun(0, 10, (Span(5, 40),))], [(8, 32, False)]),
    "rows of two sizes": ([QueryRun(2, 25, (Span(5, 40),))], [(16, 32, False), (8, 32, False)]),
    "some rows are computed twice": ([QueryRun(1, 15, (Span(5, 40),))], [(8, 32, False)] * 2),
    "scattered": ([QueryRun(0, 8, (Span(70, 9), Span(5, 9)))], [(8, 16, False)]),
    "scattered: few columns are copied at a time": (
        [QueryRun(0, 8, (Span(50, 20), Span(5, 40)))], [(8, 16, False), (8, 16, False), (8, 16, False)],
    ),
    "causal": ([QueryRun(0, 8, (Span(3, 27),), causal=True)], [(8, 16, False), (8, 8, True)]),
    "causal, nothing before": ([QueryRun(0, 8, (Span(3, 8),), causal=True)], [(8, 8, True)]),
    "causal, rows left over": ([QueryRun(0, 9, (Span(3, 30),), causal=True)], [(8, 16, False), (8, 8, True)]),
    "causal in two blocks": (
        [QueryRun(0, 24, (Span(3, 27),), causal=True)], [(16, 16, True), (8, 16, False), (8, 8, True)],
    ),
    "causal, some rows are computed twice": (
        [QueryRun(1, 31, (Span(3, 60),), causal=True)],
        [(16, 16, False), (16, 16, True), (8, 32, False), (8, 8, True), (8, 32, False), (8, 16, False), (8, 8, True)],
    ),
    "causal, too scattered for its own tokens": (
        [QueryRun(0, 16, (Span(3, 40), *(Span(50 + 5 * n, 4) for n in range(4))), causal=True)], [(16, 32, False)],
    ),
    "causal beside a decode row": (
        [QueryRun(0, 1, (Span(80, 9),)), QueryRun(1, 8, (Span(3, 24),), causal=True), QueryRun(10, 2, (Span(50, 5),))],
        [(8, 16, False), (8, 8, True)],
    ),
    "more than one long run": ([QueryRun(0, 8, (Span(3, 16),)), QueryRun(9, 8, (Span(40, 17),))], [(8, 16, False)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("rows", range(1, 60))
def test_every_row_is_used_from_one_block_and_all_blocks_are_of_the_sizes(rows):
    blocks = list(row_blocks(rows, (8, 16)))
    used = [row for start, size, first in blocks for row in range(first, start + size)]
    assert used == list(range(len(used))) and len(used) <= rows
    assert {size for _, size, _ in blocks} <= {8, 16}
    assert rows - len(used) < 6 or rows < 8
    assert all(first - start <= size / 4 for start, size, first in blocks)


def test_no_merge_has_more_parts_than_the_steps_of_a_warm_up():
    """A merge is compiled for its number of parts: 2 and 3 pieces behind the rows' own tokens are such steps."""
    counts = []

    class Counting(Inner):
        def merge(self, parts, dtype=None):
            counts.append(len(parts))
            return merge(parts)

    q, kv = rand(8, 4, 16), CacheRows(rand(2, 2, 200, 16))
    runs = [QueryRun(0, 8, (Span(3, 8 + 32 * 5 + 16 + 5),), causal=True)]  # six pieces, the rest and their own tokens
    found = CudnnBackend(Counting(q.device), Library(), SMALL).attend(q, runs, kv, ONE_BLOCK, 0.3)
    close(found, ReferenceBackend().attend(q, runs, kv, ONE_BLOCK, 0.3))
    assert counts == [4, 4, 2]
    rows, column = SMALL.rows[0], SMALL.columns[0]
    assert {(rows, column, False), (rows, 2 * column, False), (rows, 3 * column, False)} <= set(SMALL.steps)


def test_no_piece_is_rounded_in_more_merges_than_a_tree_of_merges_has():
    """Merges round to 16 bits, and a long context whose pages are apart has a hundred pieces."""
    depths = {}

    class Counting(Inner):
        def merge(self, parts, dtype=None):
            found = merge(parts)
            depths[id(found)] = found, 1 + max(depths[id(part)][1] if id(part) in depths else 0 for part in parts)
            return found

    q, kv = rand(8, 4, 16), CacheRows(rand(2, 2, 900, 16))
    runs = [QueryRun(0, 8, (Span(3, 32 * 16), Span(600, 32 * 8)))]  # 24 pieces
    found = CudnnBackend(Counting(q.device), Library(), SMALL).attend(q, runs, kv, ONE_BLOCK, 0.3)
    close(found, ReferenceBackend().attend(q, runs, kv, ONE_BLOCK, 0.3))
    assert max(depth for _, depth in depths.values()) == 3


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


@pytest.mark.parametrize("segments", [[(0, 8)], [(0, 8), (8, 3)], [(1, 5), (7, 16)], [(2, 8)], [(0, 12)]], ids=str)
def test_diagonals_of_long_segments_are_the_librarys(segments):
    rows = segments[-1][0] + segments[-1][1]
    q, k, v = rand(rows, 4, 16), rand(rows, 2, 16, 1)[..., 0], rand(rows, 2, 16)
    library = Library()
    backend = CudnnBackend(Inner(q.device), library, SMALL)
    found = backend.prepare_diagonal(segments, rows, None).attend(q, k, v, ONE_BLOCK, 0.3)
    close(found, TorchBackend(q.device).prepare_diagonal(segments, rows, None).attend(q, k, v, ONE_BLOCK, 0.3))
    assert library.calls == [(length, length, True) for _, length in segments if length in (8, 16)]


def test_a_diagonal_with_a_window_is_not_the_librarys():
    q, k = rand(8, 4, 16), rand(8, 2, 16)
    backend = CudnnBackend(Inner(q.device), Library(), SMALL)
    found = backend.prepare_diagonal([(0, 8)], 8, 3).attend(q, k, k, ONE_BLOCK, 0.3)
    close(found, TorchBackend(q.device).prepare_diagonal([(0, 8)], 8, 3).attend(q, k, k, ONE_BLOCK, 0.3))


def test_what_the_inner_backend_offers_besides_is_offered_too():
    """Recorded drafts need what a backend need not have."""
    inner = Mock(TritonBackend)
    backend = CudnnBackend(inner, Library())
    for name in ("refillable", "indexed", "slot_writer", "writer", "merge"):
        assert getattr(backend, name)(*range(len(signature(getattr(backend, name)).parameters))) is not None
        getattr(inner, name).assert_called_once()
    defaults = {name for name in vars(Backend) | vars(RecordableBackend) if not name.startswith("_")}
    assert defaults - vars(CudnnBackend).keys() == {"attend", "causal"}  # made of the others


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


@pytest.mark.parametrize(("capability", "name"), [(8, "triton"), (9, "cudnn"), (10, "triton")])
def test_auto_chooses_it_on_hopper_where_it_was_measured_and_says_why(capability, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    shape = BackendShape(**GQA, capability=capability)
    choice = choose_backend("auto", "cuda", shape, is_installed=lambda package: True)
    assert choice.name == name
    assert ("TFLOP/s on an H100" if name == "cudnn" else f"this GPU's is {capability}.x") in choice.reason
    assert choose_backend("cudnn", "cuda", shape, is_installed=lambda package: True).record is BACKEND


def test_a_rank_whose_trial_call_fails_says_so_and_computes_with_triton(monkeypatch, caplog):
    inner = Inner(torch.device("cpu"))
    monkeypatch.setattr(cudnn.triton, "BACKEND", replace(cudnn.triton.BACKEND, build=lambda device, shape: inner))
    monkeypatch.setattr(cudnn, "problem_of_library", lambda device, shape: "cuDNN's attention is off by 5.0%")
    with caplog.at_level("WARNING", "longspan.engine"):
        assert BACKEND.build(torch.device("cpu"), BackendShape(**GQA)) is inner
    assert "Triton computes long prefills too: cuDNN's attention is off by 5.0%" in caplog.text
