"""Weights that stay in FP8: the engine gives what the formula gives, however the blocks are spread over ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from longspan import LLM, SamplingParams
from longspan.config import CostConstants, EngineConfig
from longspan.engine.rank.loading import TensorStore, WeightPiece
from longspan.engine.setup import resolve
from longspan.errors import ConfigError
from longspan.models.layers import DenseLinear
from longspan.models.scaled import BlockScaled, BlockScaledLinear, problem_of_kernel, rounded
from tests.oracle import LOGPROBS, TINY, all_logprobs, greedy, prompt_of

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "initializer_range": 0.1,
}  # fmt: skip
TOKENS = 8


def blocks_of(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8, and its scales."""
    rows, columns = weight.shape
    scales = weight.reshape(rows // block, block, columns // block, block).abs().amax((1, 3)) / 448
    return (weight / spread(scales, block)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, block: int) -> torch.Tensor:
    return scales.repeat_interleave(block, 0).repeat_interleave(block, 1)


def write_model(folder: Path, block: int = 128) -> torch.nn.Module:
    """A tiny Llama's FP8 checkpoint; returns transformers' model whose products round as FP8 products do, in fp64."""
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **{**TINY, **SHAPE})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            values, scales = blocks_of(layer.weight.detach(), block)
            stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"] = values, scales
            replace_product(layer, values.double() * spread(scales, block))
    model.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(values))
    return model


def replace_product(layer: torch.nn.Linear, weight: torch.Tensor) -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, 128))
        scales = groups.abs().amax(-1, keepdim=True) / 448
        near = (groups / scales).to(torch.float8_e4m3fn).double() * scales
        return F.linear(near.flatten(-2), weight).float()

    layer.forward = product


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    return str(folder), write_model(folder)


def outputs_of(folder, layout, quantization):
    tp, pcp, dcp = layout
    with LLM(
        folder, tensor_parallel_size=tp, prefill_context_parallel_size=pcp, decode_context_parallel_size=dcp,
        page_size=4, max_num_batched_tokens=48, max_num_seqs=8, local_context=8, kv_cache_memory_bytes=4 << 20,
        num_threads=1, dtype="float32", quantization=quantization, cost=CostConstants(),
    ) as llm:  # fmt: skip
        [output] = llm.generate([prompt_of(70)], SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=LOGPROBS))
    return output.outputs[0]


@pytest.mark.parametrize("layout", [(2, 1, 2), (2, 2, 1), (1, 2, 1)], ids=str)
def test_every_layout_gives_the_tokens_of_one_rank(stored, layout):
    folder, _ = stored
    assert outputs_of(folder, layout, "fp8").token_ids == outputs_of(folder, (1, 1, 1), "fp8").token_ids


def test_kept_weights_follow_the_formula_and_dequantised_ones_do_not(stored):
    folder, model = stored
    expected = greedy(model, prompt_of(70), 1)[1][0]
    kept, plain = (all_logprobs(outputs_of(folder, (1, 1, 1), how))[0] - expected for how in ("fp8", "none"))
    assert kept.abs().max() < 0.2  # a value that is rounded the other way, since it was computed in fp32, moves others
    assert plain.abs().max() > 0.5


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_rounded_rows_times_the_weight_in_fp64(rows, bias):
    torch.manual_seed(rows)
    values, scales = blocks_of(torch.randn(256, 384), 128)
    x, offset = torch.randn(rows, 384) * 30, torch.randn(256) if bias else None
    near, row_scales = rounded(x)
    expected = (near.double() * row_scales.double().repeat_interleave(128, 1)) @ (
        values.double() * spread(scales, 128)
    ).t()
    found = BlockScaledLinear(BlockScaled(values, scales))(x, offset)
    torch.testing.assert_close(found.double(), expected if offset is None else expected + offset, atol=1e-2, rtol=1e-5)


def test_each_rows_128_columns_have_a_scale_of_their_own():
    x = torch.cat((torch.full((2, 128), 3.0), torch.full((2, 128), 3e-6), torch.zeros(2, 128)), dim=1)
    values, scales = rounded(x)
    assert scales.shape == (2, 3)
    torch.testing.assert_close(values.float() * scales.repeat_interleave(128, 1), x, rtol=1e-6, atol=0)


def test_a_slice_that_cuts_a_block_is_dequantised(stored):
    folder, _ = stored
    setup = resolve(EngineConfig(folder, quantization="fp8"))
    store = TensorStore(setup.source.checkpoint, torch.float32, scaled=setup.scaled.weights)
    name = "model.layers.0.mlp.up_proj.weight"
    whole, cut = (store.linear([WeightPiece(name, ((0, stop), (0, 256)), stacked=False)]) for stop in (384, 192))
    assert isinstance(whole, BlockScaledLinear)
    assert isinstance(cut, DenseLinear)
    x = rounded(torch.randn(3, 256))[0].float()  # no rounding is left to do, but for the scale
    torch.testing.assert_close(cut(x), whole(x)[:, :192], rtol=0.05, atol=0.5)


def test_a_cpu_dequantises_unless_asked_and_says_so(stored):
    folder, _ = stored
    said = {how: resolve(EngineConfig(folder, quantization=how)).scaled for how in ("auto", "fp8", "none")}
    assert {how: choice.weights is not None for how, choice in said.items()} == {
        "auto": False, "fp8": True, "none": False,
    }  # fmt: skip
    assert said["auto"].notes == ["FP8 weights: dequantised at load (PyTorch has no such product on a CPU)"]
    assert "kept, dequantised for each product" in said["fp8"].reason


def test_fp8_asked_of_a_checkpoint_that_has_none_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"quantization=fp8: the checkpoint's weights are not in block-scaled FP8"):
        resolve(EngineConfig(str(tmp_path), quantization="fp8"))
    assert resolve(EngineConfig(str(tmp_path))).scaled.notes == []


def test_blocks_of_another_size_are_dequantised_and_cannot_be_kept(tmp_path):
    write_model(tmp_path, block=64)
    assert resolve(EngineConfig(str(tmp_path))).scaled.weights is None
    with pytest.raises(ConfigError, match=r"blocks of 64x64 cannot be multiplied as they are.*--quantization none"):
        resolve(EngineConfig(str(tmp_path), quantization="fp8"))


def test_an_unknown_quantization_lists_the_known():
    with pytest.raises(ConfigError, match=r"quantization=awq.*auto, fp8, fp16, int8, auto-fast, none"):
        EngineConfig("m", quantization="awq")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 4, 130])
def test_pytorchs_product_equals_the_plain_one(rows):
    device = torch.device("cuda")
    if problem := problem_of_kernel(device):
        pytest.skip(problem)
    values, scales = blocks_of(torch.randn(384, 640), 128)
    weight = BlockScaled(values.to(device), scales.to(device))
    x = torch.randn(rows, 640, device=device, dtype=torch.bfloat16)
    fused, plain = BlockScaledLinear(weight, fused=True)(x), BlockScaledLinear(weight)(x)
    torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.5)
