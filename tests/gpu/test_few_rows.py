"""Products of few rows by a kernel that holds its part of the weight before x is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from longspan.early_launch import launches_early
from longspan.models.context import LayerContext
from longspan.models.decoder import DecoderModel
from longspan.models.few_rows import MOST_ROWS, FewRowsLinear, problem_of_kernel
from longspan.models.layers import DenseLinear, dense_linear
from longspan.models.ops.triton import TritonOps
from tests.gpu.launches import META, MetaLoader, counted
from tests.gpu.test_launches import LLAMA

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter has no bf16
# [out, in]: one piece of columns and several, the last one not whole; outputs that fill no block
SHAPES = [(40, 64), (33, 576), (17, 2056), (24, 4096)] + ([(3072, 2048), (2048, 8192), (515, 14336)] if GPU else [])


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, DTYPE)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=2e-2 if GPU else 1e-5, atol=2e-2 if GPU else 1e-5)


@pytest.mark.parametrize("rows", [1, MOST_ROWS])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_in_fp64_with_a_bias_and_for_rows_of_a_wider_tensor(shape, rows):
    weight, x, bias = rand(*shape) / shape[1] ** 0.5, rand(rows, shape[1] + 16)[:, 16:], rand(shape[0])
    assert close(FewRowsLinear(weight)(x, bias), F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("shape", SHAPES)
def test_its_swiglu_is_that_in_fp64(shape):
    weight, x = rand(2 * shape[0], shape[1]) / shape[1] ** 0.5, rand(MOST_ROWS, shape[1])
    gate, up = F.linear(x.double(), weight.double()).chunk(2, 1)
    assert close(FewRowsLinear(weight).swiglu(x), F.silu(gate) * up)


def test_more_rows_are_pytorchs_product_and_their_swiglu_an_operation_of_its_own():
    weight, x = rand(40, 64), rand(MOST_ROWS + 1, 64)
    assert torch.equal(FewRowsLinear(weight)(x), F.linear(x, weight))
    assert FewRowsLinear(weight).swiglu(x) is None
    assert FewRowsLinear(weight)(x[:0]).shape == (0, 40)


class FewRowsLoader(MetaLoader):
    def linear(self, *params):
        return FewRowsLinear(self.load(*params))


def test_a_dense_layer_is_seven_launches_beside_those_of_attention_and_its_write():
    def step(layers: int, rows: int) -> list[str]:
        model = DecoderModel(
            replace(LLAMA, num_layers=layers), LayerContext(FewRowsLoader(), ops=TritonOps()), torch.bfloat16
        )
        ids = torch.zeros(rows, dtype=torch.int64, device=META)
        with torch.inference_mode(), counted() as launches:
            model.layers(model.embedding(ids), ids, lambda layer, q, k, v: q.new_empty(*q.shape[:2], v.shape[-1]))
        return launches.names

    layer = step(3, MOST_ROWS)
    for name in step(2, MOST_ROWS):
        layer.remove(name)
    assert sorted(layer) == ["norm_kernel"] * 2 + ["product_kernel"] * 4 + ["rope_kernel"]
    assert "swiglu_kernel" in step(2, MOST_ROWS + 1)


def test_devices_that_do_not_launch_early_keep_pytorchs_product():
    weight = torch.empty(8, 8, dtype=torch.bfloat16)
    assert "not launched early" in problem_of_kernel(weight)
    assert isinstance(dense_linear(weight), DenseLinear)


@pytest.mark.gpu
def test_devices_that_do_take_the_kernel_for_16_bits():
    if not launches_early(torch.device("cuda")):
        pytest.skip("this GPU does not launch kernels early")
    weight = rand(64, 64)
    assert isinstance(dense_linear(weight), FewRowsLinear)
    assert "16 bits" in problem_of_kernel(weight.float())
    assert "multiple of 8" in problem_of_kernel(weight[:, :60].contiguous())


@pytest.mark.gpu
def test_replays_of_a_chain_that_is_launched_early_give_what_separate_launches_give():
    """Ten layers, each of which reads what the kernel just before it writes: a missing wait shows as another number."""
    weights = [(rand(2 * 1024, 1024) / 32, rand(1024, 1024) / 32, rand(1024)) for _ in range(10)]
    ops = TritonOps()

    def chain(x: torch.Tensor, wait: bool) -> torch.Tensor:
        residual = x
        for gate_up, down, weight in weights:
            for kernel in ("norm", "inner", "outer"):
                match kernel:
                    case "norm":
                        residual, x = ops.add_norm(x, residual, weight, 1e-5)
                    case "inner":
                        x = FewRowsLinear(gate_up).swiglu(x)
                    case _:
                        x = FewRowsLinear(down)(x)
                if wait:
                    torch.cuda.synchronize()
        return x

    x = rand(1, 1024)
    expected = chain(x, wait=True)
    given = torch.zeros_like(x)
    chain(given, wait=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(given, wait=False)
    for _ in range(50):
        given.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)
