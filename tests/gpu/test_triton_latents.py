"""The kernel of latents for Hopper: what it computes equals the definition of attention, and where it is used."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from longspan.attention.backends.base import BackendShape  # noqa: E402
from longspan.attention.backends.choice import choose_backend  # noqa: E402
from longspan.attention.backends.reference import ReferenceBackend  # noqa: E402
from longspan.attention.backends.triton import backend as backend_module  # noqa: E402
from longspan.attention.backends.triton.backend import TritonBackend  # noqa: E402
from longspan.attention.backends.triton.config import Chip, config_for, shape_of  # noqa: E402
from longspan.attention.backends.triton.hopper import problem_of_latent_kernel  # noqa: E402
from longspan.attention.rows import CacheRows  # noqa: E402
from longspan.cache.pages import Span  # noqa: E402
from longspan.parallel.heads import HeadBlock  # noqa: E402
from longspan.plan.reach import QueryRun  # noqa: E402
from tests.gpu.launches import META, counted  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
SCALE = 192**-0.5
SLOTS = 3000


def on_hopper(test):
    """A test for a Hopper GPU. Warps that wait for each other for ever must not take others' time."""
    skipped = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
    return pytest.mark.gpu(pytest.mark.timeout(120)(skipped(test)))


def run(row, length, *spans, starts=None, causal=False):
    return QueryRun(row, length, tuple(Span(*span) for span in spans), starts, causal)


CASES = {  # query heads, rows, processors, runs
    "whole tiles": (128, 1, 4, (run(0, 1, (64, 128)),)),
    "cut and merged": (128, 1, 24, (run(0, 1, (11, 2000)),)),
    "from 1 to 200 columns": (
        128, 5, 200, tuple(run(i, 1, (100 + 250 * i, n)) for i, n in enumerate((1, 63, 64, 65, 200)))
    ),
    "odd numbers of tiles": (128, 2, 1, (run(0, 1, (5, 192)), run(1, 1, (300, 321)))),
    "causal": (64, 4, 8, (run(0, 3, (9, 330), causal=True), run(3, 1, (700, 77)))),
    "windows, and blocks that are not full": (96, 3, 8, (run(0, 3, (9, 330), starts=(2, 70, 200)),)),
    "several tokens a block": (16, 11, 8, (run(0, 11, (9, 700), causal=True),)),
    "rows without columns": (128, 6, 8, (run(1, 1, (9, 50)), run(3, 2))),
    "rows that see none of their columns": (64, 3, 8, (run(0, 3, (9, 50), starts=(10, 50, 70)),)),
    "gathered": (128, 2, 8, (run(0, 1, (11, 900), (1000, 700), (2000, 100)), run(1, 1, (2200, 129)))),
    "pages of one slot": (128, 1, 4, (run(0, 1, *((slot * 7 % 2999, 1) for slot in range(300))),)),
}  # fmt: skip


def cache_of(runs, dtype):
    """A cache in which slots that no run names hold no numbers."""
    cache = torch.full((1, 1, SLOTS, 576), float("nan"), dtype=dtype)
    for span in (span for each in runs for span in each.spans):
        cache[0, 0, span.slot : span.slot + span.length] = torch.randn(span.length, 576)
    return cache


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_latents_are_attended_as_the_definition_says(case, dtype):
    heads, rows, processors, runs = CASES[case]
    torch.manual_seed(0)
    q, cache, blocks = torch.randn(rows, heads, 576).to(dtype), cache_of(runs, dtype), (HeadBlock(0, heads, 0, 1),)
    reference = ReferenceBackend().attend(q.double(), runs, CacheRows(cache.double()), blocks, SCALE)
    backend = TritonBackend(torch.device("cuda"), 512, processors, specialised=True)
    part = backend.attend(q.cuda(), runs, CacheRows(cache.cuda()), blocks, SCALE)
    torch.testing.assert_close(part.out.cpu().double(), reference.out[..., :512], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(part.lse.cpu().double(), reference.lse, rtol=5e-3, atol=5e-3)


@on_hopper
def test_the_same_launch_gives_the_same_bits_again_and_again():
    """A tile that is replaced too early, or read too early, would show."""
    runs = tuple(run(i, 1, (i * 40, 2000 + 5 * i)) for i in range(20))
    torch.manual_seed(0)
    q, cache = torch.randn(20, 128, 576).bfloat16().cuda(), CacheRows(cache_of(runs, torch.bfloat16).cuda())
    prepared = TritonBackend(torch.device("cuda"), 512, specialised=True).prepare(runs, 20)
    first, *others = (prepared.attend(q, cache, (HeadBlock(0, 128, 0, 1),), SCALE).out for _ in range(50))
    assert all(torch.equal(first, other) for other in others)


@on_hopper
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("tokens", [1, 2, 341])
def test_new_latents_are_attended_up_to_the_own_one(tokens, window):
    torch.manual_seed(0)
    q, k = torch.randn(tokens + 1, 64, 576).bfloat16(), torch.randn(tokens + 1, 1, 576).bfloat16()
    segments, blocks = ((0, tokens), (tokens, 1)), (HeadBlock(0, 64, 0, 1),)
    reference, part = (
        backend.prepare_diagonal(segments, tokens + 1, window).attend(queries, keys, None, blocks, SCALE)
        for backend, queries, keys in (
            (ReferenceBackend(), q.double(), k.double()),
            (TritonBackend(torch.device("cuda"), 512, specialised=True), q.cuda(), k.cuda()),
        )
    )
    torch.testing.assert_close(part.out.cpu().double(), reference.out[..., :512], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(part.lse.cpu().double(), reference.lse, rtol=5e-3, atol=5e-3)


@on_hopper
def test_a_captured_graph_replays_other_runs_with_room_to_spare():
    """Programs without work end, and the kernel waits for what the graph's kernels before it store."""
    filled = (run(0, 1, (11, 900), (1000, 700)), run(1, 1, (2200, 129))), (run(2, 1, (40, 2900)),), ()
    torch.manual_seed(0)
    queries, cache = (
        torch.randn(4, 128, 576).bfloat16().cuda(),
        CacheRows(cache_of(sum(filled, ()), torch.bfloat16).cuda()),
    )
    q, blocks = torch.zeros_like(queries), (HeadBlock(0, 128, 0, 1),)
    backend = TritonBackend(torch.device("cuda"), 512, specialised=True)
    refillable = backend.indexed(rows=4, index=3000)
    refillable.attend(q, cache, blocks, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q.copy_(queries).mul_(0.5)
        part = refillable.attend(q, cache, blocks, SCALE)
    for runs in filled:
        assert refillable.fill(runs)
        graph.replay()
        expected = backend.attend(queries * 0.5, runs, cache, blocks, SCALE)
        torch.testing.assert_close(part.out, expected.out, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part.lse, expected.lse, rtol=1e-3, atol=1e-3)


@on_hopper
@pytest.mark.skipif(problem_of_latent_kernel(9) is not None, reason="another Triton")
def test_on_hopper_it_is_used_unasked():
    assert TritonBackend(torch.device("cuda"), 512)._launcher.specialised


def kernel_of(attend, heads):
    """The kernel launched for one token of latents with these query heads, by a function of backend and blocks."""
    with counted() as found:
        attend(TritonBackend(META, 512, 132, specialised=True), (HeadBlock(0, heads, 0, 1),))
    return next(name for name in found.names if name.endswith("_kernel") and name != "reduce_kernel")


def latents(*sizes):
    return torch.zeros(*sizes, 576, dtype=torch.bfloat16, device=META)


LAUNCHES = {  # query rows, how they are attended
    "decode": (1, lambda backend, q, blocks: backend.attend(q, (run(0, 1, (5, 900)),), CACHE, blocks, SCALE)),
    "a recorded step": (4, lambda backend, q, blocks: backend.indexed(4).attend(q, CACHE, blocks, SCALE)),
    "a prefill": (90, lambda backend, q, blocks: backend.attend(q, (run(0, 90, (5, 900)),), CACHE, blocks, SCALE)),
    "new tokens": (
        90, lambda backend, q, blocks: backend.prepare_diagonal(((0, 90),), 90, None).attend(
            q, latents(90, 1), None, blocks, SCALE
        ),
    ),
}  # fmt: skip
CACHE = CacheRows(latents(1, 1, SLOTS))


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_way_to_attend_to_latents_uses_it_from_64_rows_on(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))  # or queries are converted first
    rows, attend = LAUNCHES[name]
    assert kernel_of(lambda backend, blocks: attend(backend, latents(rows, 64), blocks), 64) == "latent_kernel"


@pytest.mark.parametrize("heads, kernel", [(31, "attend_kernel"), (32, "latent_kernel")])
def test_drafts_use_it_once_all_their_tokens_have_64_rows(heads, kernel, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    runs = run(0, 2, (5, 900), causal=True), run(2, 1, (1000, 30))
    assert (
        kernel_of(lambda backend, blocks: backend.attend(latents(3, heads), runs, CACHE, blocks, SCALE), heads)
        == kernel
    )


@pytest.mark.parametrize(
    "key, value, groups, rows, wide, takes",
    [
        (576, 512, (), 64, False, True),
        (576, 512, (), 63, False, False),
        (576, 512, (512, 64), 128, False, False),
        (576, 512, (), 128, True, False),
        (320, 256, (), 128, False, False),
    ],
)
def test_only_many_rows_of_unquantised_latents_of_512_and_64_elements_are_for_it(key, value, groups, rows, wide, takes):
    config = config_for(shape_of(key, value, groups, True, wide), rows, Chip.LARGE, specialised=True)
    assert config.specialised is takes
    assert not config_for(shape_of(key, value, groups, True, wide), rows, Chip.LARGE).specialised


@pytest.mark.parametrize(
    "q, keys, kv_heads, can",
    [
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 576).bfloat16(), 1, True),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 0, 576).bfloat16(), 1, True),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 576).half(), 1, False),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 580).bfloat16()[..., :576], 1, False),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 584).bfloat16()[..., 4:580], 1, False),
        (torch.zeros(2, 64, 584).bfloat16()[..., :576], torch.zeros(1, 9, 576).bfloat16(), 1, False),
        (torch.zeros(2, 128, 576).bfloat16(), torch.zeros(2, 9, 576).bfloat16(), 2, False),
    ],
    ids=[
        "as a model has them", "no slots", "of two dtypes", "rows apart by no multiple of 16 bytes",
        "rows that begin at no multiple of 16 bytes", "queries apart by no multiple of 16 elements", "two KV heads",
    ],
)  # fmt: skip
def test_tensors_that_it_cannot_read_are_left_to_the_other_kernel(q, keys, kv_heads, can):
    shape = shape_of(576, 512, (), True, False)
    found = backend_module._Keys(keys, keys, keys, keys, shape)
    assert backend_module._suits_latent_kernel(q, found, HeadBlock(0, q.shape[1], 0, kv_heads)) is can


@pytest.fixture
def triton_36(monkeypatch):
    """A Triton that compiles the kernel, and does not interpret it."""
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)


def test_it_is_used_where_it_was_tried(triton_36, monkeypatch):
    assert problem_of_latent_kernel(9) is None
    assert "compute capability 9.x" in problem_of_latent_kernel(10)
    monkeypatch.setattr("triton.__version__", "3.9.0")
    assert "Triton 3.6, 3.7, 3.8, not with 3.9.0" in problem_of_latent_kernel(9)
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    assert "needs Gluon" in problem_of_latent_kernel(9)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "; 64 and more rows of latents by its kernel for Hopper"),
        ({"head_dim": 320, "value_dim": 256}, "which reads latents of 512 + 64 elements, not of 256 + 64"),
        ({"quantised": True}, "which cannot read a cache with a scale for each row"),
    ],
)
def test_the_choice_of_a_backend_says_whether_it_is_used(changes, said, triton_36):
    shape = {"head_dim": 576, "value_dim": 512, "kv_factor": 1, "quantised": False, "capability": 9}
    choice = choose_backend("triton", "cuda", BackendShape(**{**shape, **changes}, dtype=torch.bfloat16))
    assert choice.reason.startswith("asked for; ") and choice.reason.endswith(said)


def test_nothing_is_said_of_it_on_another_gpu():
    shape = BackendShape(576, 512, 1, quantised=False, dtype=torch.bfloat16, capability=8)
    assert choose_backend("triton", "cuda", shape).reason == "asked for"
