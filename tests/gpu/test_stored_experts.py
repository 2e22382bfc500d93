"""Experts that stay in FP8 or MXFP4: kernels give the sum of what the stored numbers are, and read nothing back."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from longspan.compiled.mxfp4 import mxfp4_numbers
from longspan.models import expert_forms, grouped, tiled_experts
from longspan.models.context import LinearStack
from longspan.models.experts import RoutedExperts
from longspan.models.fused_experts import few_enough, sum_fused
from longspan.models.grouped import choose_sum, sum_one_by_one
from longspan.models.sorted_experts import sum_sorted
from longspan.models.sorted_pairs import sort_pairs
from longspan.models.tiled_experts import Tile, Tiles, sum_tiled
from tests.gpu.launches import META, counted
from tests.gpu.stored_experts import DEVICE, in_bfloat16, part, plain_sum, routing, stored_layer
from tests.gpu.test_experts import compiled, moved
from tests.unit.test_experts import expected, layer
from tests.unit.test_experts import part as plain_part
from tests.unit.test_experts import routing as plain_routing

SMALL = {  # as the real ones, but small, so that a few rows have several of them
    "plain": Tiles(16, Tile(16, 32, 2, 4), Tile(32, 16, 2, 4)),
    "fp8": Tiles(16, Tile(128, 128, 2, 4), Tile(64, 128, 2, 4)),
    "fp8_bytes": Tiles(16, Tile(64, 128, 2, 4), Tile(64, 128, 2, 4)),
    "mxfp4": Tiles(16, Tile(64, 64, 2, 4), Tile(64, 64, 2, 4), flip=True),
}
CASES = {  # format, form, hidden, width, gpt-oss's activation with biases: sizes that tiles do not divide
    "mxfp4": ("mxfp4", "mxfp4", 160, 96, False),
    "mxfp4, clamped with biases": ("mxfp4", "mxfp4", 96, 160, True),
    "fp8": ("fp8", "fp8", 256, 128, False),
    "fp8 as bytes": ("fp8", "fp8_bytes", 128, 256, False),
}
TOTAL = 6


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_experts, "TILES", {form: (tiles, tiles) for form, tiles in SMALL.items()})


@pytest.fixture
def case(request, monkeypatch):
    """A layer, and whether its activations are rounded to FP8."""
    name, form, hidden, width, clamped = CASES[request.param]
    for module in ("fused_experts", "tiled_experts"):
        monkeypatch.setattr(f"longspan.models.{module}.form_of", lambda weight: form)
    return stored_layer(name, TOTAL, hidden, width, clamped), form == "fp8"


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


def hidden_of(held: RoutedExperts) -> int:
    return held.down.weight.shape[1]


def assert_sum(found, wanted, rounds):
    """Where activations are rounded, one between two FP8 numbers may go the other way."""
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (0.01 if rounds else 1e-5), float(error)


@every_case
@pytest.mark.parametrize(("form", "rows"), [(sum_fused, 1), (sum_tiled, 7)])
def test_the_sum_is_that_of_the_stored_numbers(case, form, rows):
    held, rounds = case
    given = routing(rows, TOTAL, hidden_of(held))
    assert_sum(form(held, *given), plain_sum(held, *given, rounds), rounds)


@pytest.mark.parametrize("case", ["fp8", "mxfp4, clamped with biases"], indirect=True)
@pytest.mark.parametrize("form", [sum_fused, sum_tiled])
def test_the_sums_of_several_ranks_add_up_also_with_choices_of_no_expert(case, form):
    whole, rounds = case
    x, experts, weights = routing(7, TOTAL, hidden_of(whole))
    experts[3] = whole.total
    experts[5, 1] = whole.total
    parts = [form(part(whole, *cut), x, experts, weights) for cut in ((0, 1), (1, 4), (4, 6))]
    assert_sum(sum(parts), plain_sum(whole, x, experts, weights, rounds), rounds)
    assert not any(found[3].any() for found in parts)


@every_case
@pytest.mark.parametrize("form", [sum_fused, sum_tiled])
def test_an_expert_may_have_several_tiles(case, form):
    held, rounds = case
    x, _, weights = routing(19, TOTAL, hidden_of(held), chosen=2)
    given = x, torch.tensor([[5, 0]], device=DEVICE).expand(19, 2).contiguous(), weights
    assert_sum(form(held, *given), plain_sum(held, *given, rounds), rounds)


def test_tiles_are_as_large_as_experts_have_rows_and_processors_have_memory(monkeypatch):
    monkeypatch.undo()
    few, many = tiled_experts.TILES["fp8"]
    choose, device = tiled_experts._tiles_of, torch.device("cpu")
    assert [choose("fp8", rows, device) for rows in (1, few.rows, few.rows + 1)] == [few, few, many]
    monkeypatch.setattr(tiled_experts, "shared_limit", lambda device: 99 << 10)
    assert choose("fp8", 1000, device) is few


@pytest.mark.parametrize("cut", [(0, 6), (1, 3)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_sorted_and_gathered_rows_give_the_sum_of_each_row_and_choice(rows, cut):
    held, given = plain_part(layer(), *cut), plain_routing(rows)
    found = sum_sorted(moved(held), *(x.to(DEVICE) for x in given)).cpu()
    torch.testing.assert_close(found, sum_one_by_one(held, *given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clamped", [False, True], ids=["swiglu", "clamped with biases"])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_tiles_of_plain_weights_give_the_sum_of_each_row_and_choice(rows, clamped):
    whole, given = layer(clamped=clamped), plain_routing(rows)
    found = sum_tiled(moved(whole), *(x.to(DEVICE) for x in given)).cpu()
    torch.testing.assert_close(found.double(), expected(whole, *given), atol=1e-5, rtol=1e-5)


@triton.jit
def _decode_kernel(packed, powers, out, ROWS: tl.constexpr):
    row, half = tl.arange(0, ROWS)[:, None], tl.arange(0, 16)[None, :]
    found = expert_forms._decoded(tl.load(packed + row * 16 + half), tl.load(powers + row), tl.float32)
    found = expert_forms.finished(found, "mxfp4")
    tl.store(out + row * 32 + tl.arange(0, 32)[None, :], found)


@pytest.mark.parametrize("power", [45, 64, 126, 127, 128, 129, 190])
def test_every_byte_of_mxfp4_is_decoded_exactly(power):
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(16, 16)
    powers = torch.full((16, 1), power, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(16, 32, device=DEVICE)
    _decode_kernel[(1,)](packed, powers, out, ROWS=16)
    assert torch.equal(out, mxfp4_numbers(packed, powers))


@pytest.mark.parametrize("cut", [(0, 9), (2, 7), (8, 9)], ids=str)
@pytest.mark.parametrize("rows", [1, 43, 200])
def test_pairs_are_sorted_by_expert_and_cut_into_tiles(rows, cut):
    first, stop = cut
    _, experts, _ = routing(rows, 9, 1)
    experts[0, 0] = 9  # no expert
    found = sort_pairs(experts, first, stop - first, 16)
    chosen = experts.flatten()
    each = [torch.where(chosen == number)[0].tolist() for number in range(first, stop)]
    order = [pair for pairs in each for pair in pairs]
    assert found.pairs[: len(order)].tolist() == order
    assert found.stops.tolist() == torch.tensor([len(pairs) for pairs in each]).cumsum(0).tolist()
    places = {pair: place for place, pair in enumerate(order)}
    assert found.places.tolist() == [places.get(pair, len(chosen) - 1) for pair in range(len(chosen))]
    tiles, start = [], 0
    for expert, pairs in enumerate(each):
        tiles += [(expert, start + at, min(start + at + 16, start + len(pairs))) for at in range(0, len(pairs), 16)]
        start += len(pairs)
    kept = [tuple(tile) for tile in found.tiles.tolist() if tile[0] >= 0]
    assert kept == tiles


def meta(held: RoutedExperts) -> RoutedExperts:
    stacks = (LinearStack(s.linears, s.weight.to(META), s.scales.to(META)) for s in (held.gate_up, held.down))
    return RoutedExperts(0, held.total, *stacks)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
@pytest.mark.parametrize("form", [sum_fused, sum_tiled])
def test_nothing_is_read_back(form, name):
    """On the meta device there is nothing that could be read."""
    held = meta(stored_layer(name, TOTAL, 256, 128))
    x, experts, weights = (each.to(META) for each in routing(37, TOTAL, 256))
    with counted() as launches:
        assert form(held, x, experts, weights).shape == x.shape
    assert not launches.copies
    assert 4 <= len(launches.names) <= 8, launches.names


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_kernels_compute_stored_experts_where_there_are_kernels(monkeypatch, name):
    held = stored_layer(name, TOTAL, 256, 128)
    monkeypatch.setattr(grouped, "problem_of_kernels", lambda device, dtype: "no GPU")
    assert choose_sum(held) is sum_one_by_one
    monkeypatch.setattr(grouped, "problem_of_kernels", lambda device, dtype: None)
    chosen, used = choose_sum(held), []
    for form in ("_gate_up_kernel", "_gate_up_tiles"):
        module = "fused_experts" if form == "_gate_up_kernel" else "tiled_experts"
        monkeypatch.setattr(f"longspan.models.{module}.{form}", Noting(form, used))
    for rows in (2, 70):
        assert few_enough(held, 3 * rows) == (rows == 2)
        chosen(held, *routing(rows, TOTAL, 256))
    assert used == ["_gate_up_kernel", "_gate_up_tiles"]


class Noting:
    """In place of a kernel: notes that it is launched."""

    def __init__(self, name, used):
        self.name, self.used = name, used

    def __getitem__(self, grid):
        return lambda *values, **constants: self.used.append(self.name)


def stored_on(arch):
    return compiled(str(arch), module="tests.gpu.compile_stored_experts")


def assert_fits(kernel):
    """A program fits a processor, and nothing spills but in the largest tiles of FP8."""
    assert kernel["stack"] <= (160 if kernel["form"] == "fp8" and kernel["kernel"] == "_gate_up_tiles" else 0), kernel
    assert kernel["shared"] <= kernel["limit"], kernel
    product = kernel["kernel"] not in ("_count_kernel", "_before_kernel", "_place_kernel")
    assert (kernel["mma"] + kernel["wgmma"] + kernel["tcgen05"] > 0) == product, kernel


@pytest.mark.slow
def test_the_kernels_of_stored_experts_fit_a_processor_of_an_h100():
    found = stored_on(90)
    assert len(found) == 13
    for kernel in found:
        assert_fits(kernel)
    tiles = [kernel for kernel in found if kernel["kernel"].endswith("_tiles")]
    assert all(kernel["wgmma"] > 0 for kernel in tiles)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", [80, 89, 100, 120])
def test_the_kernels_of_stored_experts_fit_other_processors(arch):
    for kernel in stored_on(arch):
        assert_fits(kernel)


def large(name: str, clamped: bool) -> RoutedExperts:
    return in_bfloat16(stored_layer(name, 16, 512, 384, clamped))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "clamped"), [("fp8", False), ("mxfp4", False), ("mxfp4", True)])
@pytest.mark.parametrize("cut", [(0, 16), (12, 16)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 700])
def test_all_forms_are_the_loops_in_bfloat16(monkeypatch, rows, cut, name, clamped):
    monkeypatch.undo()  # real tiles
    held = part(large(name, clamped), *cut)
    x, experts, weights = routing(rows, 16, 512)
    reference = sum_one_by_one(held, x.bfloat16(), experts, weights).float()
    for form in (choose_sum(held), sum_tiled):
        found = form(held, x.bfloat16(), experts, weights).float()
        assert (found - reference).abs().max() <= 0.03 * reference.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("form", [sum_fused, sum_tiled])
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_graph_takes_other_rows_that_choose_other_experts(monkeypatch, form, name):
    monkeypatch.undo()
    held = large(name, clamped=False)
    draw = partial(routing, 48, 16, 512)
    given = [each.bfloat16() if each.dim() == 2 and each.shape[1] == 512 else each for each in draw()]
    form(held, *given)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = form(held, *given)
    for place, value in zip(given, draw(seed=1), strict=True):
        place.copy_(value)
    graph.replay()
    reference = sum_one_by_one(held, *given).float()
    assert (out.float() - reference).abs().max() <= 0.03 * reference.abs().max()
