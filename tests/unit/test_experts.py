"""A mixture's experts: all forms of their sum are the loop's, nothing is read back, rows of all ranks get the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from longspan.bench.ranks import run_on_ranks
from longspan.models import moe as moe_module
from longspan.models.context import LayerContext, LinearStack
from longspan.models.experts import RoutedExperts
from longspan.models.grouped import choose_sum, sum_grouped, sum_of_none, sum_one_by_one
from longspan.models.layers import DenseLinear
from longspan.models.moe import MixtureOfExperts
from longspan.models.shapes import ShapeLoader
from longspan.parallel.experts import GatheredExperts, SharedExperts
from longspan.planner.models import find_model

HIDDEN, WIDTH, TOTAL, CHOSEN = 16, 8, 6, 3


def stack(*shape, weight=None):
    weight = torch.randn(*shape) / shape[-1] ** 0.5 if weight is None else weight
    return LinearStack(tuple(DenseLinear(each, pack=False) for each in weight), weight)


def layer(total=TOTAL, clamped=False):
    """All experts of a layer; gpt-oss's have biases and a clamped activation."""
    torch.manual_seed(1)
    found = RoutedExperts(0, total, stack(total, 2 * WIDTH, HIDDEN), stack(total, HIDDEN, WIDTH))
    biases = torch.randn(total, 2 * WIDTH), torch.randn(total, HIDDEN)
    return replace(found, gate_up_bias=biases[0], down_bias=biases[1], limit=7.0) if clamped else found


def part(whole, first, stop):
    """Experts [first, stop) of a layer."""
    stacks = (LinearStack(s.linears[first:stop], s.weight[first:stop]) for s in (whole.gate_up, whole.down))
    biases = (None if bias is None else bias[first:stop] for bias in (whole.gate_up_bias, whole.down_bias))
    return RoutedExperts(first, whole.total, *stacks, *biases, whole.limit)


def routing(rows, total=TOTAL, seed=0):
    """Rows x [rows, HIDDEN], distinct experts of each and their weights."""
    torch.manual_seed(seed)
    experts = torch.rand(rows, total).topk(CHOSEN, sorted=False).indices
    return torch.randn(rows, HIDDEN), experts, torch.rand(rows, CHOSEN)


def expected(whole, x, experts, weights):
    """The sum in fp64, one row and choice at a time."""
    found = torch.zeros(x.shape, dtype=torch.float64)
    for row, choice in torch.cartesian_prod(torch.arange(len(x)), torch.arange(experts.shape[1])).tolist():
        expert = whole.expert(int(experts[row, choice]))
        found[row] += weights[row, choice].double() * expert(x[row : row + 1])[0].double()
    return found


@pytest.mark.parametrize("clamped", [False, True], ids=["swiglu", "clamped with biases"])
@pytest.mark.parametrize("rows", [0, 1, 2, 33])
@pytest.mark.parametrize("form", [sum_one_by_one, sum_grouped])
def test_the_sum_is_that_of_each_row_and_choice(form, rows, clamped):
    whole, given = layer(clamped=clamped), routing(rows)
    torch.testing.assert_close(form(whole, *given).double(), expected(whole, *given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [sum_one_by_one, sum_grouped])
def test_all_rows_may_choose_the_same_experts(form):
    x, _, weights = routing(9)
    given = x, torch.tensor([[5, 0, 2]]).expand(9, 3).contiguous(), weights
    torch.testing.assert_close(form(layer(), *given).double(), expected(layer(), *given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clamped", [False, True], ids=["swiglu", "clamped with biases"])
@pytest.mark.parametrize("cuts", [(0, 2, 5, 6), (0, 6), (0, 1, 6), (0, 3, 3, 6)], ids=str)
@pytest.mark.parametrize("form", [sum_one_by_one, sum_grouped])
def test_the_parts_of_several_ranks_add_up(form, cuts, clamped):
    whole, given = layer(clamped=clamped), routing(17, seed=3)
    parts = [part(whole, first, stop) for first, stop in pairwise(cuts)]
    total = sum((form if len(each) else sum_of_none)(each, *given) for each in parts)
    torch.testing.assert_close(total.double(), expected(whole, *given), atol=1e-5, rtol=1e-5)


def test_rows_in_no_group_are_not_read_whatever_they_hold(monkeypatch):
    """The product leaves them unwritten."""
    product = torch._grouped_mm

    def with_nan(x, weight, offs):
        out = product(x, weight, offs=offs)
        out[offs[-1] :] = float("nan")
        return out

    monkeypatch.setattr(torch, "_grouped_mm", with_nan)
    whole, given = layer(), routing(17)
    found = sum_grouped(part(whole, 1, 3), *given)
    torch.testing.assert_close(found, sum_one_by_one(part(whole, 1, 3), *given), atol=1e-5, rtol=1e-5)


def test_experts_that_are_stored_one_by_one_are_computed_so():
    whole = layer()
    assert choose_sum(replace(whole, gate_up=LinearStack(whole.gate_up.linears))) is sum_one_by_one
    assert choose_sum(part(whole, 2, 2)) is sum_of_none


class MetaLoader(ShapeLoader):
    """Weights in bfloat16 without memory, of which one of four ranks holds a part."""

    def load(self, *params):
        found = super().load(*params)
        return found if params[0].exact else found.to(torch.bfloat16)

    def linear(self, *params):
        return DenseLinear(self.load(*params), pack=False)

    def linear_stack(self, *entries):
        weight = torch.stack([self.load(*entry) for entry in entries])
        return LinearStack(tuple(DenseLinear(each, pack=False) for each in weight), weight)


@pytest.mark.parametrize("split", [1, 4], ids=["all experts", "a quarter"])
@pytest.mark.parametrize("model", ["qwen3-235b-a22b", "deepseek-v2-lite", "deepseek-v3", "gpt-oss-120b", "mixtral"])
def test_a_layer_reads_nothing_back(monkeypatch, model, split):
    """On the meta device whatever depends on numbers raises: item, tolist, nonzero, masks as indices."""
    config = mixtral() if model == "mixtral" else find_model(model)[0]
    monkeypatch.setattr(moe_module, "choose_sum", lambda held: sum_grouped)
    loader = MetaLoader(lambda axis, size: (size // split, 2 * size // split) if split > 1 else (0, size))
    mixture = MixtureOfExperts(config.moe, config.hidden_size, "", LayerContext(loader))
    for rows in (0, 1, 300):
        x = torch.empty(rows, config.hidden_size, dtype=torch.bfloat16, device="meta")
        assert mixture(x).summed().shape == x.shape


def mixtral():
    """Mixtral 8x7B's mixture, with the sizes of a model at hand."""
    config, _ = find_model("deepseek-v2-lite")
    names = {"names": ("w1", "w3", "w2"), "shared_intermediate_size": 0}
    return replace(
        config, moe=replace(config.moe, num_experts=8, experts_per_token=2, intermediate_size=14336, **names)
    )


ROWS = (4, 0, 7)
WHOLE, UNEVEN, EVEN = layer(), [routing(n, seed=n) for n in ROWS], [routing(5, seed=n) for n in ROWS]


def _on_a_rank(rank, make_group, traffic):
    """The sum for this rank's rows, by both exchanges and on one rank, and the bytes that each sent."""
    cuts, whole, group = (0, 1, 4, 6), WHOLE, make_group((0, 1, 2))
    given, even = UNEVEN[rank], EVEN[rank]
    held = part(whole, cuts[rank], cuts[rank + 1])

    def compute(*arrived):
        return sum_one_by_one(held, *arrived)

    gathered = GatheredExperts(group)
    gathered.expect(ROWS)
    found = [sum_one_by_one(whole, *given)]
    for exchange in (gathered, SharedExperts(group, list(pairwise(cuts)))):
        traffic.reset()
        found += [exchange.apply(*given, compute), traffic.bytes_by_label["experts"]]
    gathered.expect(None)
    return [*found, sum_one_by_one(whole, *even), gathered.apply(*even, compute)]


@pytest.fixture(scope="module")
def exchanged():
    return run_on_ranks("threads", 3, _on_a_rank)


def test_both_exchanges_give_a_rows_sum_wherever_its_experts_are(exchanged):
    for alone, gathered, _, shared, *_ in exchanged:
        torch.testing.assert_close(gathered, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)


def test_members_may_have_equally_many_rows_without_being_told(exchanged):
    for *_, alone, gathered in exchanged:
        torch.testing.assert_close(gathered, alone, atol=1e-5, rtol=1e-5)


def test_gathering_sends_every_row_its_routing_and_a_sum_from_everyone(exchanged):
    sums = [(sum(ROWS) - rows) * HIDDEN * 4 for rows in ROWS]
    sent = [2 * rows * (HIDDEN + 2 * CHOSEN) * 4 for rows in ROWS]
    assert [found[2] for found in exchanged] == [a + b for a, b in zip(sent, sums, strict=True)]
