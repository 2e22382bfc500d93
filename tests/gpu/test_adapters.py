"""The adapters of attention libraries: their page tables, their logarithms, and what they leave to plain operations.

Here the libraries are stood in for by modules that compute what they document; with a GPU and the library installed
the same is asked of the real ones.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from longspan.attention.backends.flash_attn import FlashAttnBackend
from longspan.attention.backends.flashinfer import FlashInferBackend
from longspan.attention.backends.reference import ReferenceBackend
from longspan.attention.rows import CacheRows, quantise
from longspan.cache.pages import Span
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

CPU = torch.device("cpu")
SCALE = 0.2
GQA = (HeadBlock(0, 4, 0, 2),)
UNEVEN = (HeadBlock(0, 1, 0, 1), HeadBlock(1, 4, 1, 2))
LATENT = (HeadBlock(0, 4, 0, 1),)
RUNS = (
    QueryRun(0, 1, (Span(3, 9),)),
    QueryRun(1, 3, (Span(20, 1), Span(0, 2), Span(30, 7))),
    QueryRun(4, 1, ()),
    QueryRun(5, 3, (Span(5, 3), Span(11, 4)), (1, 4, 7)),
)


def softmax(q, k, v, scale, seen=None):
    """q, k, v [T, H, D] with as many heads of k and v as divide q's: out [T, H, D], natural lse [T, H]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.float(), k) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    return out.to(q.dtype), scores.logsumexp(-1).T


def causal_mask(tokens, left):
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (back >= 0) & (back <= left) if left >= 0 else back >= 0


class FakePaged:
    """`BatchPrefillWithPagedKVCacheWrapper` and `BatchMLAPagedAttentionWrapper`, as documented."""

    plans = 0

    def __init__(self, workspace, layout="NHD"):
        assert layout == "NHD"

    def plan(
        self, qo_indptr, paged_kv_indptr=None, paged_kv_indices=None, last_page_len=None, num_qo_heads=None,
        num_kv_heads=None, head_dim_qk=None, page_size=None, *, kv_indptr=None, kv_indices=None, kv_len_arr=None,
        num_heads=None, head_dim_ckv=None, head_dim_kpe=None, causal, sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert page_size == 1 and not causal and q_data_type == kv_data_type == torch.bfloat16
        assert qo_indptr.dtype == torch.int32
        FakePaged.plans += 1
        self.rows, self.scale = qo_indptr.tolist(), sm_scale
        self.starts = (paged_kv_indptr if kv_indptr is None else kv_indptr).tolist()
        self.slots = (paged_kv_indices if kv_indices is None else kv_indices).long()

    def run(self, q=None, cache=None, *, q_nope=None, q_pe=None, ckv_cache=None, kpe_cache=None, return_lse):
        assert return_lse
        if q is None:
            q, values = torch.cat([q_nope, q_pe], -1), ckv_cache
            keys = torch.cat([ckv_cache, kpe_cache], -1)[:, :, None]
            values = ckv_cache[:, :, None]
        else:
            keys, values = cache
        outs, lses = [], []
        for run in range(len(self.rows) - 1):
            slots = self.slots[self.starts[run] : self.starts[run + 1]]
            assert len(slots), "the library is given runs that see something only"
            rows = q[self.rows[run] : self.rows[run + 1]]
            out, lse = softmax(rows, keys[slots, 0], values[slots, 0], self.scale)
            outs.append(out)
            lses.append(lse / math.log(2))
        return torch.cat(outs), torch.cat(lses)


def single_prefill(q, k, v, *, causal, kv_layout, sm_scale, window_left, return_lse):
    assert causal and kv_layout == "NHD" and return_lse
    out, lse = softmax(q, k, v, sm_scale, causal_mask(len(q), window_left))
    return out, lse / math.log(2)


def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size=(-1, -1), return_attn_probs):
    assert return_attn_probs and q.shape[-1] == k.shape[-1] == v.shape[-1]
    seen = causal_mask(q.shape[1], window_size[0]) if causal else None
    out, lse = softmax(q[0], k[0], v[0], softmax_scale, seen)
    return out[None], lse.T[None], None


def flashinfer_fake():
    return FlashInferBackend(
        CPU,
        SimpleNamespace(
            BatchPrefillWithPagedKVCacheWrapper=FakePaged,
            mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=FakePaged),
            single_prefill_with_kv_cache=single_prefill,
        ),
    )


def flash_attn_fake():
    return FlashAttnBackend(CPU, SimpleNamespace(flash_attn_func=flash_attn_func))


FAKES = pytest.mark.parametrize("make", [flashinfer_fake, flash_attn_fake])


def inputs(kv_heads=2, dim=64, kv_factor=2, dtype=torch.bfloat16, device=CPU):
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(9, 4, dim, generator=generator).to(device, dtype)
    return q, CacheRows(torch.randn(kv_factor, kv_heads, 40, dim, generator=generator).to(device, dtype))


def assert_close(part, q, kv, blocks, runs=RUNS):
    """To what bf16 results can say, against the definition in fp64."""
    cpu = CacheRows(kv.values.double().cpu())
    expected = ReferenceBackend().attend(q.double().cpu(), runs, cpu, blocks, SCALE).columns(part.out.shape[-1])
    assert part.out.dtype == part.lse.dtype == torch.float32
    assert (part.out.cpu() - expected.out).abs().max() < 0.03
    assert torch.allclose(part.lse.cpu().double(), expected.lse, atol=2e-2)


@FAKES
@pytest.mark.parametrize("blocks", [GQA, UNEVEN])
def test_spans_masks_and_empty_runs(make, blocks):
    q, kv = inputs()
    assert_close(make().attend(q, RUNS, kv, blocks, SCALE), q, kv, blocks)


@FAKES
def test_no_runs_give_the_identity(make):
    q, kv = inputs()
    part = make().attend(q, (), kv, GQA, SCALE)
    assert part.lse.isneginf().all()
    assert not part.out.any()


@FAKES
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("width", [64, 40])
def test_the_diagonal(make, window, width):
    q, kv = inputs()
    k, v = kv.values[0, :, :9].transpose(0, 1), kv.values[1, :, :9, :width].transpose(0, 1)
    part = make().causal(q, k, v, UNEVEN, SCALE, window)
    expected = ReferenceBackend().causal(q.double(), k.double(), v.double(), UNEVEN, SCALE, window)
    assert (part.out - expected.out).abs().max() < 0.03
    assert torch.allclose(part.lse.double(), expected.lse, atol=2e-2)


@FAKES
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_the_library_cannot_read_plain_operations_do(make, dtype):
    q, kv = inputs()
    quantised = CacheRows(*quantise(kv.values, dtype, (64,)), (64,))
    part = make().attend(q, RUNS, quantised, GQA, SCALE)
    expected = ReferenceBackend().attend(q.double(), RUNS, quantised, GQA, SCALE)
    assert (part.out - expected.out).abs().max() < 0.03


@pytest.mark.parametrize("make", [flashinfer_fake, flash_attn_fake])
def test_latents(make):
    q, kv = inputs(kv_heads=1, dim=576, kv_factor=1)
    part = make().attend(q, RUNS, kv, LATENT, SCALE).columns(512)
    assert_close(part, q, kv, LATENT)


@FAKES
@pytest.mark.parametrize("width", [576, 64])
def test_the_diagonal_of_latents(make, width):
    q, kv = inputs(kv_heads=1, dim=width, kv_factor=1)
    k = kv.values[0, :, :9].transpose(0, 1)
    part = make().causal(q, k, None, LATENT, SCALE)
    expected = ReferenceBackend().causal(q.double(), k.double(), None, LATENT, SCALE)
    assert (part.out - expected.out).abs().max() < 0.03
    assert torch.allclose(part.lse.double(), expected.lse, atol=2e-2)


def test_flashinfer_plans_once_a_step_for_all_layers():
    q, kv = inputs()
    backend, before = flashinfer_fake(), FakePaged.plans
    prepared = backend.prepare(RUNS, len(q))
    for _ in range(3):
        prepared.attend(q, kv, GQA, SCALE)
    assert FakePaged.plans == before + 1


def test_flashinfer_plans_the_wrappers_of_earlier_steps_again():
    q, kv = inputs()
    made = []

    class Counted(FakePaged):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    backend = FlashInferBackend(CPU, SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Counted))
    for runs in (RUNS, RUNS[:2], RUNS[1:]):
        decode, prefill = (backend.prepare(some, len(q)) for some in (runs, RUNS))  # two at a time, in each step
        assert_close(decode.attend(q, kv, GQA, SCALE), q, kv, GQA, runs)
        assert_close(prefill.attend(q, kv, GQA, SCALE), q, kv, GQA)
    assert len(made) == 2


@FAKES
def test_the_diagonals_of_several_segments(make):
    q, kv = inputs()
    k, v = (plane[:, :9].transpose(0, 1) for plane in kv.values)
    segments = ((1, 3), (4, 4))
    part = make().prepare_diagonal(segments, len(q), 2).attend(q, k, v, GQA, SCALE)
    expected = (
        ReferenceBackend().prepare_diagonal(segments, len(q), 2).attend(*(x.double() for x in (q, k, v)), GQA, SCALE)
    )
    assert (part.out - expected.out).abs().max() < 0.03
    assert torch.allclose(part.lse.double(), expected.lse, atol=2e-2)


def test_flashinfer_reads_the_pool_in_place():
    pool = torch.zeros(2, 2, 40, 64, dtype=torch.bfloat16)
    seen = []

    class Recording(FakePaged):
        def run(self, q, cache, *, return_lse):
            seen.extend(cache)
            return super().run(q, cache, return_lse=return_lse)

    backend = FlashInferBackend(CPU, SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Recording))
    backend.attend(inputs()[0], RUNS[:1], CacheRows(pool), GQA, SCALE)
    assert [view.shape for view in seen] == [(40, 1, 2, 64)] * 2
    assert [view.data_ptr() for view in seen] == [pool[0].data_ptr(), pool[1].data_ptr()]
    assert seen[0].stride()[0] == 64


@pytest.mark.gpu
@pytest.mark.parametrize("name, adapter", [("flashinfer", FlashInferBackend), ("flash_attn", FlashAttnBackend)])
def test_the_library_itself(name, adapter):
    pytest.importorskip(name)
    backend = adapter(torch.device("cuda"))
    for blocks, sizes in ((GQA, {}), (UNEVEN, {}), (LATENT, {"kv_heads": 1, "dim": 576, "kv_factor": 1})):
        q, kv = inputs(device="cuda", **sizes)
        assert_close(backend.attend(q, RUNS, kv, blocks, SCALE).columns(512 if sizes else 64), q, kv, blocks)
    q, kv = inputs(device="cuda")
    k, v = (plane[:, :9].transpose(0, 1) for plane in kv.values)
    part = backend.causal(q, k, v, GQA, SCALE, 4)
    expected = ReferenceBackend().causal(*(x.double().cpu() for x in (q, k, v)), GQA, SCALE, 4)
    assert (part.out.cpu() - expected.out).abs().max() < 0.03
    assert torch.allclose(part.lse.cpu().double(), expected.lse, atol=2e-2)
