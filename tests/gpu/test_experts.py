"""Experts on a GPU: fused and grouped, eager and in a graph, they give what the loop gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from longspan.models.config import MoEConfig
from longspan.models.fused_experts import MAX_PAIRS, few_enough, sum_fused
from longspan.models.fused_router import route_fused
from longspan.models.grouped import choose_sum, sum_grouped, sum_one_by_one
from longspan.models.moe import route
from longspan.models.ops import PlainOps, choose_ops
from longspan.models.ops.triton import TritonOps
from longspan.models.sorted_experts import sum_sorted
from longspan.models.tiled_experts import sum_tiled
from tests.unit.test_experts import TOTAL, expected, layer, part, routing, stack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED = 227 * 1024  # bytes of a processor's shared memory that one program can have
CUTS = [(0, 6), (0, 2), (2, 5), (5, 6)]


def moved(held, device=DEVICE, dtype=torch.float32):
    """The same experts on a device."""

    def convert(x):
        return None if x is None else x.to(device, dtype)

    stacks = (stack(0, 1, 1, weight=convert(each.weight)) for each in (held.gate_up, held.down))
    gate_up, down = stacks
    biases = {"gate_up_bias": convert(held.gate_up_bias), "down_bias": convert(held.down_bias)}
    return replace(held, gate_up=gate_up, down=down, ops=choose_ops(torch.device(device)), **biases)


@pytest.mark.parametrize(("rows", "clamped"), [(1, False), (18, False), (7, True)])
def test_the_fused_sum_is_that_of_each_row_and_choice(rows, clamped):
    whole, given = layer(clamped=clamped), routing(rows)
    found = sum_fused(moved(whole), *(x.to(DEVICE) for x in given)).cpu()
    torch.testing.assert_close(found.double(), expected(whole, *given), atol=1e-5, rtol=1e-5)


def test_the_fused_sums_of_several_ranks_add_up():
    whole, given = layer(clamped=True), routing(21, seed=3)
    there = [x.to(DEVICE) for x in given]
    total = sum(sum_fused(moved(part(whole, *cut)), *there) for cut in CUTS[1:]).cpu()
    torch.testing.assert_close(total.double(), expected(whole, *given), atol=1e-5, rtol=1e-5)


def test_an_expert_may_be_chosen_by_all_rows_and_need_several_tiles():
    x, _, weights = routing(40)
    given = x, torch.tensor([[5, 0, 2]]).expand(40, 3).contiguous(), weights
    found = sum_fused(moved(layer()), *(each.to(DEVICE) for each in given)).cpu()
    torch.testing.assert_close(found.double(), expected(layer(), *given), atol=1e-5, rtol=1e-5)


def test_pairs_that_the_sorting_program_cannot_take_are_not_given_to_it():
    assert few_enough(layer(total=1000), MAX_PAIRS) and not few_enough(layer(total=1000), MAX_PAIRS + 1)
    assert few_enough(layer(), 16 * TOTAL) and not few_enough(layer(), 16 * TOTAL + 1)
    assert not few_enough(layer(), 0)


@pytest.mark.parametrize("hidden", [16, 1100])
@pytest.mark.parametrize("held", [21, 13, 0], ids="{} rows in groups".format)
def test_the_kernel_sums_the_rows_of_a_token_wherever_they_are_and_reads_none_that_are_in_no_group(held, hidden):
    torch.manual_seed(5)
    found, places = torch.randn(21, hidden, device=DEVICE), torch.randperm(21, device=DEVICE).view(7, 3)
    given = found, places, torch.rand(7, 3, device=DEVICE), torch.tensor([2, held], dtype=torch.int32, device=DEVICE)
    expected = PlainOps().sum_of_places(found.double(), *given[1:])
    found[held:] = float("nan")
    torch.testing.assert_close(TritonOps().sum_of_places(*given).double(), expected, atol=1e-5, rtol=1e-5)


GROUPS = {"num_groups": 4, "groups_per_token": 2, "group_top": 2, "correction_bias": True, "scoring": "sigmoid"}
ROUTERS = {
    "softmax": MoEConfig(20, 3, 8, frozenset(), normalise=False, scaling=2.5),
    "softmax, normalised": MoEConfig(64, 8, 8, frozenset()),
    "softmax of the chosen": MoEConfig(33, 4, 8, frozenset(), scoring="softmax_of_chosen"),
    "groups of 5": MoEConfig(20, 3, 8, frozenset(), scaling=1.7, **GROUPS),
    "groups of 8 by their best": MoEConfig(32, 6, 8, frozenset(), **{**GROUPS, "group_top": 1, "scoring": "softmax"}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_the_routing_kernel_chooses_and_weighs_as_the_reference(name):
    moe = ROUTERS[name]
    torch.manual_seed(4)
    logits = torch.randn(4, moe.num_experts, device=DEVICE)
    bias = torch.randn(moe.num_experts, device=DEVICE) / 4 if moe.correction_bias else None
    (experts, weights), wanted = (by_expert(form(logits, bias, moe)) for form in (route_fused, route))
    assert torch.equal(experts, wanted[0])
    torch.testing.assert_close(weights, wanted[1], atol=1e-6, rtol=1e-5)


def by_expert(routed):
    experts, weights = routed
    order = experts.argsort(1)
    return experts.gather(1, order), weights.gather(1, order)


def test_logits_that_are_no_numbers_choose_experts_all_the_same():
    """Another's memory must not be read as an expert."""
    experts, _ = route_fused(torch.full((2, 20), float("nan"), device=DEVICE), None, ROUTERS["softmax"])
    assert ((experts >= 0) & (experts < 20)).all()


def compiled(*models, module="tests.gpu.compile_experts"):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *models]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(kernel):
    """Two programs fit a processor, and nothing spills."""
    assert kernel["stack"] == 0, kernel
    assert 2 * kernel["shared"] <= SHARED, kernel
    assert 2 * kernel["registers"] * 128 <= 65536, kernel
    assert kernel["mma"] > 0 or kernel["kernel"] in ("_tiles_kernel", "_sum_kernel", "_route_kernel"), kernel


@pytest.mark.slow
def test_the_kernels_fit_a_processor_of_an_h100():
    """Of wide experts and of clamped ones with biases."""
    found = compiled("deepseek-v3", "gpt-oss-120b")
    assert len(found) == 10
    for kernel in found:
        assert_fits(kernel)


def large(clamped=False, total=16):
    """bf16 experts of 256 x 192 on the GPU."""
    torch.manual_seed(2)
    found = replace(layer(total, clamped), gate_up=stack(total, 384, 256), down=stack(total, 256, 192))
    biases = {"gate_up_bias": torch.randn(total, 384), "down_bias": torch.randn(total, 256)} if clamped else {}
    return moved(replace(found, **biases), dtype=torch.bfloat16)


def routed(rows, total=16, seed=0):
    torch.manual_seed(seed)
    experts = torch.rand(rows, total).topk(4, sorted=False).indices
    x = torch.randn(rows, 256, dtype=torch.bfloat16)
    return [each.to("cuda") for each in (x, experts, torch.rand(rows, 4))]


def assert_near(found, expected):
    """bf16 results, relative to the largest: rounded once more or less between products."""
    assert found.isfinite().all()
    assert (found.float() - expected.float()).abs().max() <= 0.03 * expected.float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("clamped", [False, True], ids=["swiglu", "clamped with biases"])
@pytest.mark.parametrize("cut", [(0, 16), (0, 4), (12, 16)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 500])
def test_fused_and_grouped_sums_are_the_loops_in_bfloat16(rows, cut, clamped):
    held, given = part(large(clamped), *cut), routed(rows)
    reference = sum_one_by_one(held, *given)
    assert_near(sum_grouped(held, *given), reference)
    assert_near(sum_tiled(held, *given), reference)
    assert_near(choose_sum(held)(held, *given), reference)
    if few_enough(held, 4 * rows):
        assert_near(sum_fused(held, *given), reference)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [sum_fused, sum_grouped, sum_sorted, sum_tiled])
def test_a_graph_takes_other_rows_that_choose_other_experts(form):
    held, given = part(large(), 0, 8), routed(32)
    form(held, *given)  # compiles, and allocates workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = form(held, *given)
    for seed in (1, 2):
        other = routed(32, seed=seed)
        for place, value in zip(given, other, strict=True):
            place.copy_(value)
        graph.replay()
        assert_near(out, sum_one_by_one(held, *other))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 500])
def test_nothing_waits_for_the_device(rows):
    held, given = large(), routed(rows)
    form = choose_sum(held)
    form(held, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        form(held, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
