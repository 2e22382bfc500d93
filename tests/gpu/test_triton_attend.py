"""The Triton backend equals the definition of attention, in Triton's interpreter or on a GPU where there is one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from longspan.attention.backends.reference import ReferenceBackend  # noqa: E402
from longspan.attention.backends.triton import backend as backend_module  # noqa: E402
from longspan.attention.backends.triton import plan as plan_module  # noqa: E402
from longspan.attention.backends.triton.backend import TritonBackend  # noqa: E402
from longspan.attention.backends.triton.config import Config  # noqa: E402
from longspan.attention.backends.triton.work import plan_work  # noqa: E402
from longspan.attention.rows import CacheRows, quantise  # noqa: E402
from longspan.attention.state import AttentionState  # noqa: E402
from longspan.attention.step_buffer import StepBuffer  # noqa: E402
from longspan.cache.pages import Span  # noqa: E402
from longspan.parallel.heads import HeadBlock, head_blocks  # noqa: E402
from longspan.plan.reach import QueryRun  # noqa: E402
from tests.ranks.attention_world import Layout, World  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROCESSORS = 4  # few, so that a test knows when rows are split
TOLERANCE = 2e-6 if DEVICE.type == "cpu" else 5e-3  # fp32 against fp64; a GPU multiplies what is cached as it is


def backend(value_dim: int = 64, processors: int = PROCESSORS) -> TritonBackend:
    return TritonBackend(DEVICE, value_dim, processors)


def heads(query: int, kv: int) -> tuple[HeadBlock, ...]:
    return head_blocks((0, query), 0, query // kv)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values of 16 bits, so that every backend is given the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def run(
    row: int,
    length: int,
    *spans: tuple[int, int],
    window_starts: tuple[int, ...] | None = None,
    causal: bool = False,
) -> QueryRun:
    return QueryRun(row, length, tuple(Span(*span) for span in spans), window_starts, causal)


def on_device(rows: CacheRows) -> CacheRows:
    return CacheRows(rows.values.to(DEVICE), None if rows.scales is None else rows.scales.to(DEVICE), rows.groups)


def check(part: AttentionState, reference: AttentionState, tolerance: float = TOLERANCE) -> None:
    width = part.out.shape[-1]
    assert part.out.dtype == part.lse.dtype == torch.float32
    torch.testing.assert_close(part.out.cpu().double(), reference.out[..., :width], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(part.lse.cpu().double(), reference.lse, rtol=tolerance, atol=tolerance)


def attends_as_reference(
    runs, rows, *, query=8, kv=2, dim=64, slots=2048, kv_factor=2, value_dim=None, blocks=None, processors=PROCESSORS
):  # fmt: skip
    q, cache = rand(rows, query, dim), CacheRows(rand(kv_factor, kv, slots, dim, seed=1))
    blocks = blocks or heads(query, kv)
    reference = ReferenceBackend().attend(q.double(), runs, CacheRows(cache.values.double()), blocks, dim**-0.5)
    part = backend(value_dim or dim, processors).attend(q.to(DEVICE), runs, on_device(cache), blocks, dim**-0.5)
    check(part, reference)
    return part


def test_decode_rows_each_see_their_own_context():
    attends_as_reference((run(0, 1, (3, 200)), run(1, 1, (210, 40)), run(2, 1, (300, 1))), rows=3)


def test_a_long_context_is_cut_and_its_pieces_are_merged():
    attends_as_reference((run(0, 1, (7, 2000)), run(1, 1, (3, 5))), rows=2, processors=16)


def test_a_segment_sees_all_earlier_tokens():
    attends_as_reference((run(0, 37, (100, 150)), run(37, 3, (500, 70))), rows=40)


@pytest.mark.parametrize("query, kv", [(4, 4), (8, 2), (7, 1), (40, 1)])
def test_any_number_of_query_heads_shares_a_kv_head(query, kv):
    attends_as_reference((run(0, 2, (5, 90)), run(2, 1, (100, 64))), rows=3, query=query, kv=kv)


def test_heads_that_begin_and_end_inside_a_group_come_in_uneven_blocks():
    blocks = head_blocks((2, 11), 0, 4)
    assert len(blocks) == 3
    attends_as_reference((run(0, 3, (5, 90)),), rows=3, query=9, kv=3, dim=16, blocks=blocks)


@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128, 192, 256])
def test_any_head_dim(dim):
    attends_as_reference((run(0, 2, (5, 70)),), rows=2, query=2, kv=1, dim=dim, slots=100)


@pytest.mark.parametrize("rows", [1, 3])
def test_latent_rows_are_keys_and_values(rows):
    part = attends_as_reference(
        (run(0, rows, (5, 90)),), rows=rows, query=24, kv=1, dim=576, slots=100, kv_factor=1, value_dim=512
    )
    assert part.out.shape[-1] == 512


@pytest.mark.parametrize("flip", [False, True])
def test_warp_groups_may_divide_the_columns_of_a_tile(monkeypatch, flip):
    """Of whole tiles and of others, adjacent and gathered, of a part of the rows' elements and of the rest."""
    config = Config(64, 64, 8, 2, 1, flip, split=True)
    monkeypatch.setattr(backend_module, "config_for", lambda *_: config)
    runs = (run(0, 1, (5, 190)), run(1, 1, (9, 50), (100, 20), (130, 70)), run(2, 2, (5, 30), causal=True))
    attends_as_reference(runs, rows=4, query=40, kv=1, dim=576, slots=220, kv_factor=1, value_dim=512)


def test_latent_values_wider_than_the_rows_largest_power_of_two():
    part = attends_as_reference((run(0, 2, (5, 90)),), rows=2, kv=1, dim=48, slots=100, kv_factor=1, value_dim=40)
    assert part.out.shape[-1] == 48


def test_a_window_hides_the_first_tokens_of_a_run():
    window_starts = tuple(range(0, 120, 3))
    attends_as_reference((run(0, 40, (9, 130), window_starts=window_starts), run(40, 2, (200, 9))), rows=42)


CAUSAL = (
    run(0, 20, (100, 150), causal=True),
    run(20, 37, (5, 37), causal=True),  # a first chunk
    run(57, 1, (300, 70)),
    run(58, 7, (400, 3), (600, 11), (700, 4), causal=True),  # gathered
    run(66, 9, (800, 90), window_starts=tuple(range(60, 78, 2)), causal=True),
)


def test_causal_runs_see_their_own_tokens_up_to_each_row():
    attends_as_reference(CAUSAL, rows=76)


def test_a_causal_run_is_cut_into_items_that_are_merged():
    spans = (7, 700), (1500, 40), (1600, 30)
    attends_as_reference((run(0, 9, *spans, causal=True),), rows=9, query=2, kv=1, dim=16, processors=16)


@pytest.mark.parametrize("rows", [2, 19])
def test_causal_runs_of_latents(rows):
    runs = (run(0, rows, (5, 90), causal=True),)
    attends_as_reference(runs, rows=rows, query=24, kv=1, dim=576, slots=100, kv_factor=1, value_dim=512)


@pytest.mark.parametrize("dtype", [torch.float16] if DEVICE.type == "cpu" else [torch.bfloat16, torch.float16])
def test_out_may_be_written_in_the_dtype_of_the_model(dtype):
    """By an item alone, and by the reduction. The interpreter does not round to bf16."""
    q, kv = rand(4, 4, 16).to(DEVICE), on_device(CacheRows(rand(2, 1, 900, 16, seed=1)))
    prepared = backend(16, 16).prepare((run(0, 3, (5, 20), causal=True), run(3, 1, (30, 800))), 4)
    wide, narrow = (prepared.attend(q, kv, heads(4, 1), 0.25, wanted) for wanted in (None, dtype))
    assert (wide.out.dtype, narrow.out.dtype) == (torch.float32, dtype)
    assert torch.equal(narrow.out, wide.out.to(dtype))
    assert torch.equal(narrow.lse, wide.lse)


def test_the_diagonals_of_several_segments_are_causal_each():
    segments, rows = ((1, 5), (6, 17), (25, 40)), 70
    q, k, v = rand(rows, 4, 64), rand(rows, 2, 64, seed=1), rand(rows, 2, 64, seed=2)
    for window in (None, 7):
        reference, part = (
            some.prepare_diagonal(segments, rows, window).attend(*(to(x) for x in (q, k, v)), heads(4, 2), 0.125)
            for some, to in ((ReferenceBackend(), torch.Tensor.double), (backend(), lambda x: x.to(DEVICE)))
        )
        check(part, reference)


def test_rows_whose_window_ends_before_the_run_see_nothing():
    part = attends_as_reference((run(0, 3, (9, 50), window_starts=(10, 50, 70)),), rows=3)
    assert torch.isneginf(part.lse[1:]).all() and not part.out[1:].any()


def test_rows_of_no_run_and_of_an_empty_shard_are_the_identity():
    part = attends_as_reference((run(1, 1, (9, 50)), run(3, 2)), rows=6)
    assert torch.isneginf(part.lse[[0, 2, 3, 4, 5]]).all() and not part.out[[0, 2, 3, 4, 5]].any()


def test_no_rows_are_no_work():
    assert attends_as_reference((), rows=0).out.shape == (0, 8, 64)


def test_a_shard_of_one_token_gives_its_value():
    part = attends_as_reference((run(0, 1, (17, 1)),), rows=1)
    values = rand(2, 2, 2048, 64, seed=1)[1, :, 17].repeat_interleave(4, 0)
    torch.testing.assert_close(part.out[0].cpu(), values.float(), rtol=1e-6, atol=1e-6)


def test_pages_of_one_token_anywhere():
    slots = torch.randperm(2048, generator=torch.Generator().manual_seed(3)).tolist()
    attends_as_reference((run(0, 3, *((slot, 1) for slot in slots[:300])),), rows=3)


def test_short_and_long_spans_of_one_run():
    spans = ((0, 5), (7, 9), (20, 1100), (1200, 1), (1300, 30), (1203, 4))
    window_starts = (2, 12, 900, 1120)
    attends_as_reference((run(0, 4, *spans, window_starts=window_starts), run(4, 1, *spans)), rows=5)


def test_slots_whose_offset_needs_more_than_32_bits():
    slots, dim, stride = 1 << 20, 16, (1 << 11) + 64  # memory of slots that nobody touches is never there
    q, near = rand(2, 2, dim), rand(1, 1, 40, dim, seed=1)
    far = torch.empty(slots * stride, dtype=torch.float16).as_strided((1, 1, slots, dim), (0, 0, stride, 1)).to(DEVICE)
    far[:, :, slots - 40 :] = near
    reference = ReferenceBackend().attend(
        q.double(), (run(0, 2, (0, 40)),), CacheRows(near.double()), heads(2, 1), 0.25
    )
    for spans in (((slots - 40, 40),), ((slots - 40, 10), (slots - 30, 30))):  # adjacent, gathered
        part = backend(dim).attend(q.to(DEVICE), (run(0, 2, *spans),), CacheRows(far), heads(2, 1), 0.25)
        check(part, reference)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "dim, kv_factor, groups, value_dim", [(64, 2, (64,), 64), (96, 1, (64, 32), 64), (80, 2, (80,), 80)]
)
def test_quantised_rows_are_attended_as_they_read(dtype, dim, kv_factor, groups, value_dim):
    q = rand(4, 8, dim)
    kv = CacheRows(*quantise(rand(kv_factor, 1, 400, dim, seed=1), dtype, groups), groups)
    runs = (run(0, 3, (3, 90), causal=True), run(3, 1, (100, 30), (140, 70)))
    reference = ReferenceBackend().attend(q.double(), runs, CacheRows(kv.read(torch.float64)), heads(8, 1), 0.2)
    check(backend(value_dim).attend(q.to(DEVICE), runs, on_device(kv), heads(8, 1), 0.2), reference)


@pytest.mark.parametrize("groups, kv_factor", [((48, 32), 1), ((64, 16), 2)])
def test_scale_groups_that_no_cache_has_are_refused(groups, kv_factor):
    kv = CacheRows(*quantise(rand(kv_factor, 1, 40, 80, seed=1), torch.int8, groups), groups)
    with pytest.raises(ValueError, match="groups of scales"):
        backend(80).attend(rand(1, 1, 80).to(DEVICE), (run(0, 1, (3, 9)),), on_device(kv), heads(1, 1), 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype(dtype):
    q, kv = rand(3, 8, 64).to(dtype), rand(2, 2, 300, 64, seed=1).to(dtype)
    runs = (run(0, 3, (7, 250)),)
    reference = ReferenceBackend().attend(q.double(), runs, CacheRows(kv.double()), heads(8, 2), 0.125)
    check(backend().attend(q.to(DEVICE), runs, CacheRows(kv.to(DEVICE)), heads(8, 2), 0.125), reference)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 500])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_the_diagonal_is_causal(tokens, window):
    q, k, v = rand(tokens, 4, 64), rand(tokens, 2, 64, seed=1), rand(tokens, 2, 64, seed=2)
    reference = ReferenceBackend().causal(q.double(), k.double(), v.double(), heads(4, 2), 0.125, window)
    check(backend().causal(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), heads(4, 2), 0.125, window), reference)


def test_the_diagonal_of_expanded_latents_has_narrower_values():
    q, kv = rand(20, 2, 192), rand(20, 2, 192 + 128, seed=1)  # keys and values are views of one projection
    k, v = kv[..., :192], kv[..., 192:]
    reference = ReferenceBackend().causal(q.double(), k.double(), v.double(), heads(2, 2), 0.07)
    on = kv.to(DEVICE)
    part = backend().causal(q.to(DEVICE), on[..., :192], on[..., 192:], heads(2, 2), 0.07)
    assert part.out.shape[-1] == 128
    check(part, reference)


@pytest.mark.parametrize(
    "tokens, query, dim, value_dim",
    [(1, 16, 576, 512), (2, 16, 576, 512), (17, 16, 576, 512), (2, 128, 576, 512), (341, 2, 576, 512), (17, 4, 48, 40)],
)
def test_the_diagonal_of_latents_reads_keys_and_values_from_the_same_rows(tokens, query, dim, value_dim):
    q, k = rand(tokens, query, dim), rand(tokens, 1, dim, seed=1)
    reference = ReferenceBackend().causal(q.double(), k.double(), None, heads(query, 1), dim**-0.5)
    part = backend(value_dim).causal(q.to(DEVICE), k.to(DEVICE), None, heads(query, 1), dim**-0.5)
    assert value_dim <= part.out.shape[-1] <= dim
    check(part, reference)


@pytest.mark.parametrize("window", [1, 5, 500])
def test_the_diagonal_of_latents_under_a_window(window):
    q, k = rand(20, 4, 96), rand(20, 1, 96, seed=1)
    reference = ReferenceBackend().causal(q.double(), k.double(), None, heads(4, 1), 0.1, window)
    check(backend(64).causal(q.to(DEVICE), k.to(DEVICE), None, heads(4, 1), 0.1, window), reference)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)  # the interpreter rounds no 8-bit floats
@pytest.mark.skipif(DEVICE.type == "cuda", reason="its ranks are on the CPU")
def test_chunks_of_requests_equal_dense_attention(cache_dtype):
    world = World(
        Layout(q_heads=2, kv_heads=1, head_dim=16, budget=19, page_size=4, windows=(None, 7), cache_dtype=cache_dtype),
        backend(16),
        torch.float32,
    )
    world.add("0", [1] * 30, 1)
    world.add("1", [2] * 7, 2)
    world.run()
    world.add("2", [1] * 22, 1)  # begins with cached pages
    world.run()
    assert world.worst_error < 1e-5


DECODES = (
    (run(0, 1, (3, 300)), run(1, 1, (310, 40)), run(2, 1, (360, 130))),
    (run(0, 1, (50, 10), (90, 30), (70, 5)), run(2, 1, (0, 490))),
    (),
    (run(1, 2, (5, 64), window_starts=(3, 30)),),
)


def decode_rows() -> tuple[torch.Tensor, CacheRows]:
    return rand(4, 2, 16).to(DEVICE), CacheRows(rand(2, 1, 500, 16, seed=1).to(DEVICE))


def test_refilled_runs_give_what_fresh_runs_give():
    q, kv = decode_rows()
    engine = backend()
    refillable = engine.indexed(rows=4, index=100)
    refillable.attend(q, kv, heads(2, 1), 0.25)  # makes the buffers
    addresses = {plan.adjacent.data_ptr() for plan in refillable.plans.plans}
    for runs in DECODES:
        assert refillable.fill(runs)
        part, fresh = (some.attend(q, kv, heads(2, 1), 0.25) for some in (refillable, engine.prepare(runs, 4)))
        assert torch.equal(part.out, fresh.out) and torch.equal(part.lse, fresh.lse)
    assert addresses == {plan.adjacent.data_ptr() for plan in refillable.plans.plans}


def test_refillable_runs_refuse_what_they_have_no_room_for_and_stay_as_they_are():
    q, kv = decode_rows()
    refillable = backend().indexed(rows=4, index=0)
    refillable.attend(q, kv, heads(2, 1), 0.25)
    assert refillable.fill(DECODES[0])
    before = refillable.attend(q, kv, heads(2, 1), 0.25)
    assert not refillable.fill(DECODES[1])  # needs an index of slots
    assert torch.equal(refillable.attend(q, kv, heads(2, 1), 0.25).out, before.out)


def test_runs_over_the_pages_of_several_ranks_need_no_room_in_an_index():
    """A recorded step reads them in place, so that short contexts too are replayed."""
    q, kv = decode_rows()
    engine, buffer = backend(), StepBuffer(DEVICE)
    refillable = engine.refillable(4, 500, buffer)
    refillable.attend(q, kv, heads(2, 1), 0.25)
    runs = (run(0, 1, (50, 40), (190, 40), (310, 30)), run(2, 1, (5, 20), (400, 21)))
    assert refillable.fill(runs)
    buffer.send()
    part, whole = (some.attend(q, kv, heads(2, 1), 0.25) for some in (refillable, engine.prepare(runs, 4)))
    torch.testing.assert_close(part.out, whole.out)
    torch.testing.assert_close(part.lse, whole.lse)


def test_prepared_runs_are_for_one_number_of_rows():
    q, kv = decode_rows()
    with pytest.raises(ValueError, match="4 rows for work of 3"):
        backend().indexed(rows=3).attend(q, kv, heads(2, 1), 0.25)


def test_a_step_plans_once_for_all_its_layers(monkeypatch):
    planned = []
    monkeypatch.setattr(plan_module, "plan_work", lambda *args: planned.append(args) or plan_work(*args))
    q, kv = decode_rows()
    prepared = backend().prepare(DECODES[3], 4)
    for _ in range(3):
        prepared.attend(q, kv, heads(2, 1), 0.25)
    assert len(planned) == 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_captured_graph_replays_other_runs():
    q, kv = decode_rows()
    engine = TritonBackend(DEVICE, 16)
    refillable = engine.indexed(rows=4, index=100)
    refillable.attend(q, kv, heads(2, 1), 0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part = refillable.attend(q, kv, heads(2, 1), 0.25)
    for runs in DECODES:
        assert refillable.fill(runs)
        graph.replay()
        fresh = engine.attend(q, runs, kv, heads(2, 1), 0.25)
        torch.testing.assert_close(part.out, fresh.out)
        torch.testing.assert_close(part.lse, fresh.lse)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_capture_needs_buffers_made_before_it():
    q, kv = decode_rows()
    engine = TritonBackend(DEVICE, 16)
    refillable = engine.indexed(rows=4)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        refillable.attend(q, kv, heads(2, 1), 0.25)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("query, kv, dim, kv_factor, value_dim", [(64, 8, 128, 2, 128), (128, 1, 576, 1, 512)])
@pytest.mark.parametrize("length", [1, 4, 300])
def test_shapes_of_real_models_on_a_gpu(query, kv, dim, kv_factor, value_dim, length):
    q, cache = rand(length, query, dim).bfloat16(), rand(kv_factor, kv, 9000, dim, seed=1).bfloat16()
    runs = (run(0, length, (11, 8900)),)
    reference = ReferenceBackend().attend(q.double(), runs, CacheRows(cache.double()), heads(query, kv), dim**-0.5)
    part = TritonBackend(DEVICE, value_dim).attend(
        q.to(DEVICE), runs, CacheRows(cache.to(DEVICE)), heads(query, kv), dim**-0.5
    )
    check(part, reference)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("query", [8, 16, 128])
@pytest.mark.parametrize("tokens", [1, 2, 17, 341])
def test_the_diagonal_of_deepseek_latents_on_a_gpu(tokens, query):
    q, k = rand(tokens, query, 576).bfloat16(), rand(tokens, 1, 576, seed=1).bfloat16()
    reference = ReferenceBackend().causal(q.double(), k.double(), None, heads(query, 1), 192**-0.5)
    check(TritonBackend(DEVICE, 512).causal(q.to(DEVICE), k.to(DEVICE), None, heads(query, 1), 192**-0.5), reference)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("query, kv, dim, kv_factor, value_dim", [(16, 2, 128, 2, 128), (64, 1, 576, 1, 512)])
@pytest.mark.parametrize("spans", [((11, 2000),), ((11, 900), (1000, 700), (5000, 100))], ids=["adjacent", "gathered"])
def test_causal_runs_of_real_models_in_16_bits_on_a_gpu(query, kv, dim, kv_factor, value_dim, spans):
    q, cache = rand(301, query, dim).bfloat16(), rand(kv_factor, kv, 6000, dim, seed=1).bfloat16()
    runs = (run(0, 300, *spans, causal=True), run(300, 1, (5200, 500)))
    reference = ReferenceBackend().attend(q.double(), runs, CacheRows(cache.double()), heads(query, kv), dim**-0.5)
    prepared = TritonBackend(DEVICE, value_dim).prepare(runs, len(q))
    part = prepared.attend(q.to(DEVICE), CacheRows(cache.to(DEVICE)), heads(query, kv), dim**-0.5, torch.bfloat16)
    assert part.out.dtype == torch.bfloat16
    expected = reference.out[..., : part.out.shape[-1]]
    torch.testing.assert_close(part.out.cpu().double(), expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(part.lse.cpu().double(), reference.lse, rtol=5e-3, atol=5e-3)
