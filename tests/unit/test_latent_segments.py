"""Segments over a cache of latents give the same whether they are attended absorbed, from the cache, or expanded."""

import pytest
import torch

from longspan.attention.attend import Attention
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.layer import AttentionLayer
from longspan.attention.pool import KVPool
from longspan.attention.schedules import ContextGroup
from longspan.attention.variants import AttentionOps, Heads
from longspan.attention.workload import ExpansionCost
from longspan.cache.layout import KVLayout
from longspan.cache.pages import Span
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun, Reach
from longspan.plan.view import PhaseView, RankView, WriteRun

HEADS, LATENT, ROPE, QUERY, VALUE = 3, 8, 2, 4, 5


class Latents:
    """Random maps between latents and heads, in float64."""

    value_dim = VALUE

    def __init__(self):
        self.keys, self.out = torch.randn(HEADS, LATENT, QUERY).double(), torch.randn(HEADS, LATENT, VALUE).double()

    def absorb(self, q):
        return torch.cat([torch.einsum("thq,hlq->thl", q[..., :QUERY], self.keys), q[..., QUERY:]], -1)

    def expand(self, rows):
        keys = torch.einsum("tl,hlq->htq", rows[:, :LATENT], self.keys)
        keys = torch.cat([keys, rows[:, LATENT:].expand(HEADS, -1, -1)], -1)
        values = torch.einsum("tl,hlv->htv", rows[:, :LATENT], self.out)
        return torch.stack([keys, torch.nn.functional.pad(values, (0, QUERY + ROPE - VALUE))])

    def values(self, latents):
        return torch.einsum("thl,hlv->thv", latents, self.out)


@pytest.mark.parametrize("saved", [1, 1000], ids=["the longest", "all"])
def test_expanded_segments_equal_those_that_read_themselves_absorbed(saved):
    torch.manual_seed(3)
    latents, pool = Latents(), torch.randn(1, 1, 200, LATENT + ROPE).double()
    runs = (QueryRun(0, 40, (Span(0, 90),), None, True), QueryRun(40, 3, (Span(100, 20),), None, True))
    view = PhaseView(0, 43, (), (Reach("local", 43, runs, (), (), ()),))
    writes = (WriteRun(0, 50, 40), WriteRun(40, 117, 3))
    q, k = torch.randn(43, HEADS, QUERY + ROPE).double(), torch.randn(43, 1, LATENT + ROPE).double()
    found = []
    for cost in (ExpansionCost(), ExpansionCost(saved, 20)):
        heads = (HeadBlock(0, HEADS, 0, 1),)
        ops = AttentionOps(TorchBackend(torch.device("cpu")), Heads(heads, heads, ()), 0.3, LATENT, cost)
        cache = KVPool(KVLayout(1, 1, LATENT + ROPE, 8, kv_factor=1), (0,), 50, 4, torch.float64)
        cache.layers[0].values.copy_(pool)
        attention = Attention(cache, ops, ContextGroup(None, ((0,),), ((0,),), 1), (None,))
        step = attention.preparer.step(RankView((0,) * 43, (0,) * 43, writes, (view,), (), ()))
        assert bool(step.phases[0].groups[0].local_diagonal) == bool(cost.saved_per_pair)
        attention.begin(step)
        found.append(attention(AttentionLayer(0, latent=latents), q, k, k))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
