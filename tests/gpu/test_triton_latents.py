"""Latents computed by groups of warps that take turns equal the definition of attention, on a Hopper GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from longspan.attention.backends.reference import ReferenceBackend  # noqa: E402
from longspan.attention.backends.triton import backend as backend_module  # noqa: E402
from longspan.attention.backends.triton.backend import TritonBackend  # noqa: E402
from longspan.attention.backends.triton.config import Chip, config_for, shape_of  # noqa: E402
from longspan.attention.rows import CacheRows  # noqa: E402
from longspan.cache.pages import Span  # noqa: E402
from longspan.parallel.heads import HeadBlock  # noqa: E402
from longspan.plan.reach import QueryRun  # noqa: E402

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
    backend = TritonBackend(torch.device("cuda"), 512, processors, turns=True)
    part = backend.attend(q.cuda(), runs, CacheRows(cache.cuda()), blocks, SCALE)
    torch.testing.assert_close(part.out.cpu().double(), reference.out[..., :512], rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(part.lse.cpu().double(), reference.lse, rtol=5e-3, atol=5e-3)


@on_hopper
def test_the_same_launch_gives_the_same_bits_again_and_again():
    """A tile that is replaced too early, or read too early, would show."""
    runs = tuple(run(i, 1, (i * 40, 2000 + 5 * i)) for i in range(20))
    torch.manual_seed(0)
    q, cache = torch.randn(20, 128, 576).bfloat16().cuda(), CacheRows(cache_of(runs, torch.bfloat16).cuda())
    prepared = TritonBackend(torch.device("cuda"), 512, turns=True).prepare(runs, 20)
    first, *others = (prepared.attend(q, cache, (HeadBlock(0, 128, 0, 1),), SCALE).out for _ in range(50))
    assert all(torch.equal(first, other) for other in others)


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
def test_only_many_rows_of_unquantised_latents_of_512_and_64_elements_take_turns(key, value, groups, rows, wide, takes):
    config = config_for(shape_of(key, value, groups, True, wide), rows, Chip.LARGE, turns=True)
    assert config.turns is takes
    assert not config_for(shape_of(key, value, groups, True, wide), rows, Chip.LARGE).turns


@pytest.mark.parametrize(
    "q, keys, kv_heads, can",
    [
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 576).bfloat16(), 1, True),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 576).half(), 1, False),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 0, 576).bfloat16(), 1, False),
        (torch.zeros(2, 64, 576).bfloat16(), torch.zeros(1, 9, 580).bfloat16()[..., :576], 1, False),
        (torch.zeros(2, 128, 576).bfloat16(), torch.zeros(2, 9, 576).bfloat16(), 2, False),
    ],
    ids=["as a model has them", "of two dtypes", "no slots", "rows that are not aligned", "two KV heads"],
)
def test_tensors_that_cannot_be_read_in_turns_are_left_to_the_other_kernel(q, keys, kv_heads, can):
    shape = shape_of(576, 512, (), True, False)
    found = backend_module._Keys(keys, keys, keys, keys, shape)
    assert backend_module._can_take_turns(q, found, HeadBlock(0, q.shape[1], 0, kv_heads)) is can
