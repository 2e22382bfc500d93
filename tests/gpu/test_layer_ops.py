"""Triton's operations between matrix products give the numbers of PyTorch's.

Both round at the same places, so in 16 bits they agree but where sums of squares, in another order, round differently.
Triton's interpreter does not round to bfloat16: without a GPU float16 stands for it.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from longspan.models.config import MLAConfig, ModelConfig, RopeConfig
from longspan.models.context import LayerContext
from longspan.models.decoder import DecoderModel
from longspan.models.layers import DenseLinear
from longspan.models.ops import PlainOps, choose_ops
from longspan.models.params import Param

pytest.importorskip("triton")

from longspan.models.ops.triton import TritonOps

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
PLAIN, TRITON = PlainOps(), TritonOps()
EPS = 1e-5


def random(*shape, dtype=HALF, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def assert_rounded_alike(found, expected, share=0.999):
    """Equal but for single units in the last place; in fp32 a few of them, everywhere."""
    assert found.dtype == expected.dtype
    if found.dtype == torch.float32:
        return assert_close(found, expected, rtol=2e-6, atol=1e-6)
    assert_close(found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-6)
    assert (found == expected).float().mean() >= share
    return None


def assert_equal(found, expected):
    """Bit for bit in 16 bits; fp32 sums and products may be contracted, and the interpreter has NumPy's functions."""
    assert_rounded_alike(found, expected, share=1.0 if HAS_GPU else 0.999)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 576, 4096])
def test_a_norm(dtype, width):
    x, weight = random(5, width, dtype=dtype, scale=3), random(width, dtype=dtype)
    assert_rounded_alike(TRITON.norm(x, weight, EPS), PLAIN.norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_a_slice_in_place_leaves_the_rest(dtype):
    rows, weight = random(7, 96, dtype=dtype), random(64, dtype=dtype)
    expected = torch.cat((PLAIN.norm(rows[:, :64], weight, EPS), rows[:, 64:]), dim=1)
    for ops in (PLAIN, TRITON):
        found = rows.clone()
        ops.norm(found[:, :64], weight, EPS, out=found[:, :64])
        assert_rounded_alike(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 4096])
def test_a_sum_and_its_norm(dtype, width):
    x, residual, weight = (random(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(5, width)] * 2 + [(width,)]))
    before = residual.clone()
    total, normed = TRITON.add_norm(x, residual, weight, EPS)
    assert torch.equal(total, residual + x)
    assert_rounded_alike(normed, PLAIN.norm(total, weight, EPS))
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [56, 1536])
def test_swiglu(dtype, width):
    gate_up = random(5, 2 * width, dtype=dtype, scale=4)
    assert_equal(TRITON.swiglu(gate_up), PLAIN.swiglu(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_many_rows(dtype):
    gate_up = random(1029, 2 * 136, dtype=dtype, scale=4)[:, 16:]
    assert_equal(TRITON.swiglu(gate_up), PLAIN.swiglu(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_swiglu(dtype):
    gate_up = random(5, 2 * 1088, dtype=dtype, scale=5)
    gate_up[0, :2] = float("nan")
    found, expected = TRITON.clamped_swiglu(gate_up, 7.0), PLAIN.clamped_swiglu(gate_up, 7.0)
    assert found[0, 0].isnan() and expected[0, 0].isnan()
    assert_equal(found[1:], expected[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 80, 128])
def test_the_rope_table_of_any_position(dtype, dim):
    positions = torch.tensor([0, 1, 77, 4095, 131_071, 9_999_999], device=DEVICE)
    inverse = (1.0 / (500_000.0 ** (torch.arange(0, dim, 2).float() / dim))).to(DEVICE)
    for found, expected in zip(
        TRITON.rope_table(positions, inverse, 1.25, dtype), PLAIN.rope_table(positions, inverse, 1.25, dtype),
        strict=True,
    ):  # fmt: skip
        assert found.shape == (6, 1, dim)
        assert_equal(found, expected)


def rotated(ops, heads, dim, norms=(), interleaved=False):
    heads = [x.clone(memory_format=torch.preserve_format) for x in heads]
    positions = torch.arange(len(heads[0]), device=DEVICE) * 1000
    inverse = (1.0 / (10_000.0 ** (torch.arange(0, dim, 2).float() / dim))).to(DEVICE)
    ops.rope(heads, PLAIN.rope_table(positions, inverse, 1.0, heads[0].dtype), norms, EPS, interleaved)
    return heads


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (96, 24), (80, 80), (128, 32)])
def test_rope_of_one_tensor(dtype, width, dim, interleaved):
    heads = [random(3, 5, width, dtype=dtype)]
    for found, expected in zip(*(rotated(ops, heads, dim, (), interleaved) for ops in (TRITON, PLAIN)), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (80, 80), (128, 32)])
def test_rope_of_queries_and_keys_with_their_norms(dtype, width, dim):
    heads = [random(3, 18, width, dtype=dtype, scale=2), random(3, 2, width, dtype=dtype, scale=2)]
    norms = random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
    for found, expected in zip(*(rotated(ops, heads, dim, norms) for ops in (TRITON, PLAIN)), strict=True):
        assert_rounded_alike(found, expected, share=0.99)


@pytest.mark.parametrize("ops", [PLAIN, TRITON], ids=["plain", "triton"])
def test_rope_changes_what_it_is_given_and_nothing_beside_it(ops):
    """Queries and keys in one buffer before the values, as a projection gives them; and the ends of wider rows."""
    for dim, interleaved in ((16, False), (8, True)):
        fused, wide = random(4, 7, 16), random(4, 3, 40)
        expected_q, expected_k = rotated(PLAIN, [fused[:, :4].clone(), fused[:, 4:6].clone()], dim, (), interleaved)
        (expected_wide,) = rotated(PLAIN, [wide[..., 24:].clone()], dim, (), interleaved)
        found, found_wide = fused.clone(), wide.clone()
        table = PLAIN.rope_table(torch.arange(4, device=DEVICE) * 1000, inverse_of(dim), 1.0, HALF)
        ops.rope((found[:, :6],), table, interleaved=interleaved)
        ops.rope((found_wide[..., 24:],), table, interleaved=interleaved)
        assert_equal(found, torch.cat((expected_q, expected_k, fused[:, 6:]), dim=1))
        assert_equal(found_wide, torch.cat((wide[..., :24], expected_wide), dim=2))


def inverse_of(dim):
    return (1.0 / (10_000.0 ** (torch.arange(0, dim, 2).float() / dim))).to(DEVICE)


def test_interleaved_pairs_are_those_of_the_other_order_reordered():
    x = random(3, 2, 16, dtype=torch.float32)
    order = torch.arange(16).view(8, 2).t().flatten()
    for ops in (PLAIN, TRITON):
        assert_close(rotated(ops, [x], 16, (), True)[0], rotated(ops, [x[..., order]], 16)[0])


@pytest.mark.parametrize("first", [0, 30, 100])
def test_tokens_outside_a_part_of_the_vocabulary_give_zeros(first):
    table, token_ids = random(40, 1030), torch.tensor([0, 29, 30, 31, 69, 70, 100, 139, 140], device=DEVICE)
    found = TRITON.embed(token_ids, table, first)
    assert torch.equal(found, PLAIN.embed(token_ids, table, first))
    for row, token in zip(found, token_ids.tolist(), strict=True):
        assert torch.equal(row, table[token - first] if first <= token < first + 40 else torch.zeros_like(row))


@pytest.mark.parametrize("ops", [PLAIN, TRITON], ids=["plain", "triton"])
def test_steps_without_rows(ops):
    x, weight, ids = random(0, 16), random(16), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert ops.norm(x, weight, EPS).shape == (0, 16)
    assert [y.shape for y in ops.add_norm(x, x, weight, EPS)] == [(0, 16)] * 2
    assert ops.swiglu(x).shape == ops.clamped_swiglu(x, 7.0).shape == (0, 8)
    table = ops.rope_table(ids, inverse_of(8), 1.0, HALF)
    assert table.cos.shape == table.sin.shape == (0, 1, 8)
    ops.rope((random(0, 4, 8), random(0, 2, 8)), table)
    assert ops.embed(ids, random(40, 16), 0).shape == (0, 16)


class RandomLoader:
    """A loader of random weights, the same at each request of one name."""

    device = DEVICE

    def extent(self, axis: str, size: int) -> tuple[int, int]:
        return 0, size

    def load(self, *params: Param) -> torch.Tensor:
        parts = [
            random(*param.shape, dtype=torch.float32, scale=0.3, seed=sum(param.name.encode())) for param in params
        ]
        return torch.cat(parts)

    def table(self, param: Param, is_multiplied: bool) -> torch.Tensor:
        return self.load(param)

    def linear(self, *params: Param) -> DenseLinear:
        return DenseLinear(self.load(*params))


TINY = ModelConfig(
    "LlamaForCausalLM", num_layers=2, hidden_size=48, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=40,
    vocab_size=61, max_position_embeddings=512, rms_norm_eps=1e-5, rope=RopeConfig(partial_rotary_factor=0.5),
)  # fmt: skip
LATENT = MLAConfig(q_lora_rank=24, kv_lora_rank=16, query_dim=12, rope_dim=8, value_dim=8)
MODELS = {
    "llama": TINY,
    "qwen3": replace(TINY, qk_norm=True),
    "latent": replace(TINY, rope=RopeConfig(), num_kv_heads=1, head_dim=24, mla=LATENT),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_logits_do_not_depend_on_the_form(name):
    """With something simple in place of attention that depends on every element of queries, keys and values."""
    token_ids, positions = (torch.tensor(values, device=DEVICE) for values in ([3, 60, 0], [0, 7, 300]))

    def attend(layer, q, k, v):
        mixed = q.cumsum(-1) * k.square().mean((1, 2), keepdim=True) + v.mean((1, 2), keepdim=True)
        return mixed[..., : layer.latent.value_dim if layer.latent else None]

    with torch.inference_mode():
        contexts = [LayerContext(RandomLoader(), ops=ops) for ops in (PLAIN, TRITON)]
        models = [DecoderModel(MODELS[name], context, torch.float32) for context in contexts]
        expected, found = (model.head(model.layers(model.embedding(token_ids), positions, attend)) for model in models)
    assert expected.std() > 0.1
    assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_many_rows_in_place_are_rotated_once(interleaved):
    """Threads that load what another one has stored would show in some of so many rows."""
    q, k = random(4096, 40, 192)[..., 128:], random(4096, 1, 576)[..., 512:]
    for found, expected in zip(*(rotated(ops, (q, k), 64, (), interleaved) for ops in (TRITON, PLAIN)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_gpu_has_triton_and_the_operations_of_a_step_are_captured():
    assert isinstance(choose_ops(DEVICE), TritonOps)
    x, residual, weight, gate_up = random(8, 4096), random(8, 4096), random(4096), random(8, 2048)
    expected = (*TRITON.add_norm(x, residual, weight, EPS), TRITON.swiglu(gate_up))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = (*TRITON.add_norm(x, residual, weight, EPS), TRITON.swiglu(gate_up))
    graph.replay()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_cpu_has_the_plain_operations():
    assert isinstance(choose_ops(torch.device("cpu")), PlainOps)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from longspan.models.few_rows import MOST_ROWS, product_kernel
from longspan.models.fused_rounding import round_kernel
from longspan.models.ops import kernels

def build(kernel, warps, arguments, constants):
    names, early = kernel.arg_names, constants.get("EARLY", False)
    given = [name for name in names if name in constants]
    signature = dict(zip([name for name in names if name not in given], arguments, strict=True))
    signature = {name: signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32)
    made = compile(source, target=target, options={"num_warps": warps, "launch_pdl": early})
    assert made.metadata.shared <= 232448, kernel
    assert ("griddepcontrol.wait" in made.asm["ptx"]) == early, kernel

x, two = "*bf16", ("i32", "i32")
norm = {"WIDTH": 7168, "BLOCK": 8192, "ADD": True, "EARLY": True}
build(kernels.norm_kernel, 8, [x] * 5 + [("i32",) * 3, "fp32"], norm)
build(kernels.swiglu_kernel, 4, [x, x, "i32", "i32", "i32"], {"EXACT": True, "ROWS": 16, "BLOCK": 128, "EARLY": True})
build(kernels.clamped_swiglu_kernel, 4, [x, x, "i32", "i32", "fp32", "fp32"], {"EXACT": True, "BLOCK": 1024})
build(kernels.rope_table_kernel, 1, ["*i64", "*fp32", x, x, "fp32"], {"HALF": 40, "BLOCK": 64, "EXACT": True})
build(kernels.embed_kernel, 4, ["*i64", x, x, "i32", "i32", "i32"], {"BLOCK": 1024})
build(
    round_kernel, 4, [x, "*fp8e4nv", "*fp32", *["i32"] * 4],
    {"LARGEST": 448.0, "LEAST": 1.1754943508222875e-38, "WIDTH": 128, "ROWS": 16},
)
for dim, interleaved, norm in ((64, True, False), (32, False, True)):
    build(
        kernels.rope_kernel, 4, [x] * 6 + [two, two, "i32", "i32", "fp32"],
        {"WIDTH": max(dim, 96), "DIM": dim, "INTERLEAVED": interleaved, "NORM": norm, "HEADS": 1024 // (dim // 2),
         "HALF": dim // 2, "REST": 64 if dim < 96 else 1, "EARLY": True},
    )
for inputs, pieces, together, warps, gated in ((2048, 1, 4, 4, False), (14336, 7, 1, 8, False), (2048, 1, 2, 4, True)):
    build(
        product_kernel, warps, [x] * (4 if inputs > 2048 else 3) + ["i32", "i32"],
        {**({} if inputs > 2048 else {"bias": None}), "INPUTS": inputs, "ROWS": MOST_ROWS, "OUTPUTS": together,
         "PIECE": 2048, "PIECES": pieces, "TOGETHER": 8, "GATED": gated, "EXACT": True, "EARLY": True},
    )
"""


def test_every_kernel_compiles_for_a_gpu_without_one():
    """The interpreter takes what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
