"""Kernels that are compiled for the CPU equal PyTorch's operations, and a machine without them says why."""

import atexit
import os
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.nn import functional as F

from longspan.attention.backends.compiled import CompiledBackend
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.backends.reference import ReferenceBackend
from longspan.attention.rows import CacheRows, quantise
from longspan.cache.pages import Span
from longspan.compiled import library
from longspan.compiled.folder import KeptFiles
from longspan.compiled.library import KernelProblem, address, open_kernels, problem_of_kernels
from longspan.config import ParallelConfig
from longspan.engine.computation import choose_kernels
from longspan.engine.rank.loading import RankLoader, TensorStore
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig, RopeConfig
from longspan.models.context import LayerContext
from longspan.models.decoder import Embedding, Head
from longspan.models.layers import PanelLinear
from longspan.models.ops import PlainOps, choose_ops
from longspan.parallel.grid import Grid
from longspan.parallel.heads import HeadBlock
from longspan.parallel.sharding import Sharding
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun
from longspan.weights.checkpoint import RandomWeights

compiled = pytest.mark.skipif(problem_of_kernels() is not None, reason=f"no kernels: {problem_of_kernels()}")
PLAIN = PlainOps()
ROWS = [0, 1, 2, 3, 5, 13, 530]
CPU = torch.device("cpu")
COMPILE = library._compile


@pytest.fixture
def ops():
    return choose_ops(CPU, compiled=True)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@compiled
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [(96, 64), (61, 7)], ids=str)
def test_a_product_by_panels_is_the_plain_one_and_a_row_does_not_depend_on_the_others(rows, size):
    x, weight, bias = normal(rows, size[1]), normal(*size), normal(size[0])
    product = PanelLinear(weight)
    for offset in (None, bias):
        assert_same(product(x, offset), F.linear(x, weight, offset))
    assert all(torch.equal(product(row[None])[0], found) for row, found in zip(x[:20], product(x), strict=False))


@compiled
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("first", [None, 0, 100])
@pytest.mark.parametrize("size", [(96, 64), (61, 7)], ids=str)
def test_rows_are_looked_up_in_panels_and_in_a_plain_table(ops, size, first, rows):
    table, token_ids = normal(*size), torch.arange(2 * rows)[::2] % 180
    token_ids = token_ids % size[0] if first is None else token_ids
    expected = PLAIN.embed(token_ids, table, first)
    for held in (table, PanelLinear(table).panels):
        assert torch.equal(ops.embed(token_ids, held, first), expected)


@compiled
def test_a_head_that_is_the_embedding_table_is_stored_once(ops):
    model = ModelConfig(
        "LlamaForCausalLM", num_layers=1, hidden_size=48, num_q_heads=4, num_kv_heads=2, head_dim=12, vocab_size=61,
        intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5, rope=RopeConfig(),
        tie_word_embeddings=True,
    )  # fmt: skip
    store = TensorStore(RandomWeights(), torch.float32, form="panels")
    context = LayerContext(RankLoader(store, Sharding(Grid(ParallelConfig()), 0, 4, 2)), ops=ops)
    assert Embedding(model, context)._table is Head(model, context)._product.panels
    assert not store._tensors


@compiled
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [64, 7])
def test_norms_and_swiglu_are_the_plain_ones_on_strided_rows_too(ops, rows, width):
    x, residual, weight = normal(rows, width + 3)[:, :width], normal(rows, width), normal(width)
    assert_same(ops.norm(x, weight, 1e-5), PLAIN.norm(x, weight, 1e-5))
    for found, expected in zip(
        ops.add_norm(x, residual, weight, 1e-5), PLAIN.add_norm(x, residual, weight, 1e-5), strict=True
    ):
        assert_same(found, expected)
    gate_up = 30 * normal(rows, 2 * width + 5)[:, : 2 * width]
    assert_same(ops.swiglu(gate_up), PLAIN.swiglu(gate_up))


@compiled
def test_a_norm_may_overwrite_its_rows(ops):
    x, weight = normal(3, 16), normal(16)
    expected = PLAIN.norm(x, weight, 1e-5)
    assert ops.norm(x, weight, 1e-5, out=x) is x
    assert_same(x, expected)


@compiled
def test_what_is_not_a_number_stays_so(ops):
    gate_up = torch.tensor([[float("nan"), -1e9, 1e9, 1.0] * 8])
    torch.testing.assert_close(ops.swiglu(gate_up), PLAIN.swiglu(gate_up), equal_nan=True)


@compiled
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 200])
def test_heads_are_rotated_in_place_as_plainly(ops, rows, interleaved, normed):
    table = PLAIN.rope_table(torch.arange(rows), torch.rand(16), 1.0, torch.float32)
    found, expected = normal(rows, 5, 48), normal(rows, 5, 48)
    norms = (normal(48), normal(48) + 1) if normed else ()
    for x, form in ((found, ops), (expected, PLAIN)):
        form.rope((x[:, :3], x[:, 3:]), table, norms, 1e-5, interleaved)
    assert_same(found, expected)


RUNS = (
    QueryRun(0, 1, (Span(3, 9),)),
    QueryRun(2, 3, (Span(20, 1), Span(0, 2), Span(30, 7))),
    QueryRun(5, 1, ()),
    QueryRun(6, 1, (Span(100, 300), Span(900, 400))),  # divided among threads
    QueryRun(7, 2, (Span(100, 300), Span(900, 400))),
    QueryRun(9, 250, (Span(400, 90), Span(100, 205), Span(700, 120)), causal=True),
    QueryRun(262, 4, (Span(5, 3), Span(11, 4)), (0, 2, 6, 7)),  # the last row sees nothing
    QueryRun(266, 100, (Span(5, 200),), tuple(range(50, 150)), causal=True),
)
"""Row 1 and some more are in no run."""


@compiled
@pytest.mark.parametrize("kv_factor", [1, 2])
@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("blocks", [(HeadBlock(0, 9, 0, 3),), (HeadBlock(0, 8, 0, 2), HeadBlock(8, 9, 2, 3))], ids=len)
def test_attention_over_runs_of_all_kinds_equals_the_reference(blocks, dim, kv_factor):
    q, kv = normal(370, 9, dim), CacheRows(normal(kv_factor, 3, 1400, dim))
    found = CompiledBackend().attend(q, RUNS, kv, blocks, 0.3)
    expected = ReferenceBackend().attend(q, RUNS, kv, blocks, 0.3)
    assert_same(found.out, expected.out.float())
    assert_same(found.lse, expected.lse.float())


def pool_of(dtype, heads=3, slots=1400, dim=16):
    """Keys and values in 8 bits, of rows whose sizes differ much."""
    sizes = torch.logspace(-3, 0.5, slots)[:, None]
    values, scales = quantise(normal(2, heads, slots, dim) * sizes, dtype, (dim,))
    return CacheRows(values, scales, (dim,))


@compiled
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_attention_over_quantised_rows_equals_the_reference(dtype):
    q, kv = normal(370, 9, 16), pool_of(dtype)
    blocks = (HeadBlock(0, 8, 0, 2), HeadBlock(8, 9, 2, 3))
    found = CompiledBackend().attend(q, RUNS, kv, blocks, 0.3)
    expected = ReferenceBackend().attend(q, RUNS, kv, blocks, 0.3)
    assert_same(found.out, expected.out.float())
    assert_same(found.lse, expected.lse.float())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_rows_are_written_as_plainly(dtype):
    rows = torch.cat((torch.randn(40, 3, 16), torch.zeros(1, 3, 16), 1e-40 * torch.randn(1, 3, 16)))
    rows[0, 0, 0] = float("nan")
    k, v = rows * torch.logspace(-6, 4, 16), rows.flip(0)
    writes = (WriteRun(0, 7, 30), WriteRun(35, 50, 7))

    def pool():
        if dtype == torch.float32:
            return CacheRows(torch.zeros(2, 3, 60, 16))
        return CacheRows(torch.zeros(2, 3, 60, 16, dtype=dtype), torch.zeros(2, 3, 60, 1), (16,))

    found, expected = pool(), pool()
    CompiledBackend().writer(writes, len(rows)).write(found, k, v)
    CpuBackend().writer(writes, len(rows)).write(expected, k, v)
    if dtype != torch.float32:
        torch.testing.assert_close(found.scales, expected.scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.read(torch.float32), expected.read(torch.float32), rtol=0, atol=0, equal_nan=True)


@compiled
def test_rows_of_queries_may_be_strided_and_slots_that_nobody_sees_are_not_read():
    seen = torch.cat([torch.arange(span.slot, span.slot + span.length) for run in RUNS for span in run.spans])
    kv = torch.full((2, 3, 1400, 16), float("nan"))
    kv[:, :, seen] = normal(2, 3, len(seen), 16)
    q = normal(370, 2, 9, 32)[:, 1, :, ::2]
    blocks = (HeadBlock(0, 9, 0, 3),)
    found = CompiledBackend().attend(q, RUNS, CacheRows(kv), blocks, 0.3)
    assert_same(found.out, ReferenceBackend().attend(q, RUNS, CacheRows(kv), blocks, 0.3).out.float())


@compiled
def test_a_kernel_refuses_what_it_would_misread():
    for wrong in (torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(4, 2).t()):
        with pytest.raises(TypeError, match="takes fp32 rows of adjacent elements"):
            address(wrong)


@pytest.fixture
def compilations(monkeypatch):
    """The folders into which kernels were compiled: without optimisation, and once for all tests."""

    def compile_once(folder):
        compilations.append(folder)
        return Path(shutil.copy(unoptimised(), folder / "kernels.so"))

    compilations: list[Path] = []
    monkeypatch.setattr(library, "_compile", compile_once)
    return compilations


@cache
def unoptimised():
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_FLAGS", ("-O0", *library._FLAGS[1:]))
        return COMPILE(Path(folder.name))


@compiled
def test_kernels_are_compiled_once_and_kept(tmp_path, compilations):
    for _ in range(2):
        assert open_kernels(KeptFiles(tmp_path / "cache")).lanes() >= 4
    assert len(compilations) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


@compiled
@pytest.mark.parametrize("left", [0, 1000, -4096, -1])
def test_a_file_that_was_cut_off_is_not_opened_but_replaced(tmp_path, compilations, left):
    """The system would end a process that opens a part of a library."""
    open_kernels(KeptFiles(tmp_path))
    kept = tmp_path / f"kernels-{library.fingerprint()}.so"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:left])
    open_kernels(KeptFiles(tmp_path))
    assert kept.read_bytes() == whole
    assert len(compilations) == 2


@compiled
@pytest.mark.parametrize("of", ["the folder", "the file"])
def test_a_file_that_others_could_have_written_is_not_opened(tmp_path, compilations, of):
    open_kernels(KeptFiles(tmp_path))
    (tmp_path if of == "the folder" else next(tmp_path.iterdir())).chmod(0o777)
    open_kernels(KeptFiles(tmp_path))
    assert len(compilations) == 2


def test_a_machine_without_room_for_the_compiler_computes_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    with pytest.raises(KernelProblem, match=r"they cannot be compiled: .*full"):
        open_kernels(KeptFiles(tmp_path))


@compiled
def test_kernels_do_without_a_folder_that_can_be_written(tmp_path, compilations):
    (tmp_path / "file").write_text("")
    assert open_kernels(KeptFiles(tmp_path / "file" / "cache")).lanes() >= 4


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [(None, "there is no C++ compiler"), ("/bin/false", "/bin/false fails"), (os.devnull, "does not run")],
)
def test_a_machine_that_cannot_compile_says_why_and_computes_plainly(compiler, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_compiler", lambda: compiler)
    with pytest.raises(KernelProblem, match=re.escape(problem)) as raised:
        open_kernels(KeptFiles(tmp_path))
    monkeypatch.setattr("longspan.engine.computation.problem_of_kernels", lambda: str(raised.value))
    kind, line = choose_kernels("auto", "cpu", torch.float32)
    assert kind == "plain" and problem in line
    with pytest.raises(ConfigError, match=f"cpu_kernels=compiled: .*{re.escape(problem)}.*use auto or plain"):
        choose_kernels("compiled", "cpu", torch.float32)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_kernels_serve_fp32_on_a_cpu_only(device, dtype):
    assert choose_kernels("auto", device, dtype) == ("plain", "")
    with pytest.raises(ConfigError, match="they compute in float32 on a CPU"):
        choose_kernels("compiled", device, dtype)
