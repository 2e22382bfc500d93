"""`merge` is associative, commutative, has an identity, and equals attention over the union (idea 3)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention.state import AttentionState, concatenate, merge, with_sink

INF = float("inf")


def attention(scores, values):
    """The partial over keys with these scores [T, H, S] and values [S, H, D]."""
    if scores.shape[-1] == 0:
        return AttentionState.empty(scores.shape[0], scores.shape[1], values.shape[-1], values)
    weights = torch.softmax(scores, -1)
    return AttentionState(torch.einsum("ths,shd->thd", weights, values), torch.logsumexp(scores, -1))


def close(a, b, tolerance=1e-12):
    return torch.allclose(a.out, b.out, atol=tolerance) and torch.allclose(a.lse, b.lse, atol=tolerance)


@st.composite
def shards(draw):
    """Scores of wildly different magnitude, cut into shards, some of them empty."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(sum))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    scale = draw(st.sampled_from([0.1, 1.0, 50.0]))
    scores = torch.randn(3, 2, sum(sizes), dtype=torch.float64, generator=generator) * scale
    values = torch.randn(sum(sizes), 2, 4, dtype=torch.float64, generator=generator)
    parts = [attention(s, v) for s, v in zip(scores.split(sizes, dim=-1), values.split(sizes), strict=True)]
    return parts, attention(scores, values)


@given(shards())
@settings(max_examples=200, deadline=None)
def test_merging_shards_equals_attention_over_all_keys(case):
    parts, whole = case
    assert close(merge(parts), whole)


@given(shards(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_and_grouping_do_not_matter(case, random):
    parts, whole = case
    random.shuffle(parts)
    while len(parts) > 1:
        at = random.randrange(len(parts) - 1)
        parts[at : at + 2] = [merge(parts[at : at + 2])]
    assert close(parts[0], whole)


@given(shards())
@settings(max_examples=50, deadline=None)
def test_the_empty_state_is_the_identity(case):
    _, whole = case
    empty = AttentionState.empty(3, 2, 4, whole.out)
    assert close(merge([whole, empty]), whole)
    assert close(merge([empty, whole]), whole)


@given(st.integers(0, 1 << 30), st.floats(-40, 40))
@settings(max_examples=50, deadline=None)
def test_a_sink_is_one_more_key_whose_value_is_zero(seed, score):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    values = torch.randn(5, 2, 4, dtype=torch.float64, generator=generator)
    sink = torch.tensor([score, -score], dtype=torch.float64)
    longer = torch.cat([scores, sink.expand(3, 2)[..., None]], -1)
    expected = attention(longer, torch.cat([values, torch.zeros(1, 2, 4, dtype=torch.float64)]))
    assert close(with_sink(attention(scores, values), sink), expected)


def test_a_sink_alone_gives_nothing():
    part = with_sink(AttentionState.empty(3, 2, 4, torch.zeros(1)), torch.tensor([1.0, -2.0]))
    assert torch.equal(part.out, torch.zeros(3, 2, 4))
    assert torch.equal(part.lse, torch.tensor([1.0, -2.0]).expand(3, 2))


def test_all_shards_empty_stays_empty():
    empty = AttentionState.empty(3, 2, 4, torch.zeros(1))
    merged = merge([empty, empty, empty])
    assert torch.equal(merged.out, torch.zeros(3, 2, 4))
    assert torch.all(merged.lse == -INF)


def test_garbage_of_weight_zero_is_skipped_not_multiplied():
    good = AttentionState(torch.ones(1, 1, 2), torch.zeros(1, 1))
    bad = AttentionState(torch.full((1, 1, 2), float("nan")), torch.full((1, 1), -INF))
    assert torch.equal(merge([good, bad]).out, good.out)


@pytest.mark.parametrize("lse", [float("nan"), INF, -INF])
def test_a_backend_edge_turns_any_empty_side_into_the_identity(lse):
    part = AttentionState.normalised(torch.full((1, 1, 2), float("nan")), torch.full((1, 1), lse))
    assert torch.equal(part.out, torch.zeros(1, 1, 2))
    assert part.lse.item() == -INF


def test_a_half_precision_model_still_merges_in_fp32():
    empty = AttentionState.empty(1, 1, 2, torch.zeros(1, dtype=torch.bfloat16))
    assert empty.out.dtype == empty.lse.dtype == torch.float32


def test_concatenate_keeps_rows_in_order():
    parts = [AttentionState(torch.full((n, 1, 1), float(n)), torch.full((n, 1), float(n))) for n in (1, 2)]
    assert concatenate(parts).lse[:, 0].tolist() == [1.0, 2.0, 2.0]
