"""Mixtures whose experts are stored in FP8 or MXFP4: the engine gives the tokens of the numbers that are stored."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longspan import LLM, SamplingParams
from longspan.compiled.mxfp4 import mxfp4_numbers
from longspan.config import CostConstants, EngineConfig
from longspan.engine.memory import weight_format
from longspan.engine.rank import scaled_weights
from longspan.engine.rank.loading import TensorStore, WeightPiece
from longspan.engine.setup import resolve
from longspan.models import grouped
from longspan.weights.formats import WeightFormat
from tests.models.test_block_scaled_weights import blocks_of
from tests.oracle import TINY, greedy, prompt_of

TOKENS = 5
LAYOUTS = {
    "one rank": {},
    "experts over tp": {"tensor_parallel_size": 2},
    "experts over pcp": {"prefill_context_parallel_size": 2, "enable_expert_parallel": True},
}
PROJECTION = re.compile(r"\.experts\.\d+\.\w+_proj\.weight$")


def write(folder, model, replaced, quantisation):
    """A checkpoint in which some tensors are replaced."""
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if replaced(name)]:
        stored |= replaced(name)(stored.pop(name), name)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": quantisation}))
    return str(folder)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """A tiny gpt-oss in MXFP4, and transformers' model of its numbers."""
    folder = tmp_path_factory.mktemp("mxfp4")
    fields = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 11}
    torch.manual_seed(5)
    config = AutoConfig.for_model("gpt_oss", **{**TINY, **fields, "hidden_size": 96, "intermediate_size": 64})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    packed = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, into, out = parameter.shape
            values = torch.randint(0, 256, (count, out, into // 2), dtype=torch.uint8)
            scales = torch.randint(121, 125, (count, out, into // 32), dtype=torch.uint8)
            parameter.data.copy_(mxfp4_numbers(values, scales).mT)
            packed[name] = {f"{name}_blocks": values.view(count, out, -1, 16), f"{name}_scales": scales}
    written = write(
        folder, model, lambda name: name in packed and (lambda tensor, name: packed[name]),
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    )  # fmt: skip
    return written, model


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A tiny Qwen3 mixture whose experts are in FP8."""
    fields = {
        "hidden_size": 128, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 128,
        "use_sliding_window": False, "norm_topk_prob": True,
    }  # fmt: skip
    torch.manual_seed(5)
    config = AutoConfig.for_model("qwen3_moe", **{**TINY, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def quantised(tensor, name):
        values, scales = blocks_of(tensor, 128)
        return {name: values, f"{name}_scale_inv": scales}

    return write(
        tmp_path_factory.mktemp("fp8"), model, lambda name: PROJECTION.search(name) and quantised,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    )  # fmt: skip


def tokens_of(folder, quantization="auto", **layout):
    with LLM(
        folder, page_size=4, max_num_batched_tokens=48, max_num_seqs=4, kv_cache_memory_bytes=4 << 20, num_threads=1,
        dtype="float32", quantization=quantization, cost=CostConstants(), executor="threads", **layout,
    ) as llm:  # fmt: skip
        [output] = llm.generate([prompt_of(23)], SamplingParams(temperature=0, max_tokens=TOKENS))
    return output.outputs[0].token_ids


@pytest.fixture
def with_kernels(monkeypatch):
    """As on a GPU: MXFP4 is kept, and computed by Triton's kernels, here in its interpreter."""
    pytest.importorskip("triton")
    for module in (grouped, scaled_weights):
        monkeypatch.setattr(module, "problem_of_kernels", lambda device, dtype: None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mxfp4_gives_the_tokens_of_its_numbers_under_every_layout(mxfp4, layout):
    folder, model = mxfp4
    assert tokens_of(folder, **LAYOUTS[layout]) == greedy(model, prompt_of(23), TOKENS)[0]


def test_mxfp4_that_is_kept_gives_the_same_tokens(mxfp4, with_kernels):
    """On one rank: the interpreter runs in one thread."""
    folder, model = mxfp4
    assert tokens_of(folder) == greedy(model, prompt_of(23), TOKENS)[0]


def test_mxfp4_is_kept_where_kernels_multiply_it_and_counted_so(mxfp4, with_kernels):
    folder, _ = mxfp4
    kept, asked = (resolve(EngineConfig(folder, quantization=how)) for how in ("auto", "none"))
    assert kept.scaled.packed is not None and kept.scaled.notes == ["MXFP4 weights: kept"]
    assert asked.scaled.packed is None
    assert asked.scaled.notes == ["MXFP4 weights: dequantised at load (--quantization none)"]
    held = weight_format(kept.source.config, torch.bfloat16, kept.scaled)
    assert held == WeightFormat(attention=2.0, ffn=0.53125, experts=0.53125, embedding=2.0)
    assert weight_format(kept.source.config, torch.bfloat16, asked.scaled) == WeightFormat()


def test_a_cpu_dequantises_mxfp4_and_says_why(mxfp4):
    assert resolve(EngineConfig(mxfp4[0])).scaled.notes == [
        "MXFP4 weights: dequantised at load (its kernels are for GPUs)"
    ]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
def test_fp8_experts_give_the_same_tokens_under_every_layout(fp8, layout):
    assert tokens_of(fp8, "fp8", **LAYOUTS[layout]) == tokens_of(fp8, "fp8")


def test_fp8_experts_are_in_one_tensor_as_they_are_stored(fp8):
    setup = resolve(EngineConfig(fp8, quantization="fp8"))
    store = TensorStore(setup.source.checkpoint, torch.float32, scaled=setup.scaled.weights)
    entries = [
        [
            WeightPiece(f"model.layers.1.mlp.experts.{expert}.{role}_proj.weight", ((0, 128), (0, 128)), stacked=False)
            for role in ("gate", "up")
        ]
        for expert in (4, 2)
    ]
    found, x = store.linear_stack(entries), torch.randn(3, 128)
    assert found.stored.dtype == torch.float8_e4m3fn and found.stored.shape == (2, 256, 128)
    assert found.scales.shape == (2, 2, 1)
    for linear, entry in zip(found.linears, entries, strict=True):
        assert torch.equal(linear(x), store.linear(entry)(x))


def test_mxfp4_experts_are_in_one_tensor_as_they_are_stored(mxfp4, with_kernels):
    folder, _ = mxfp4
    setup = resolve(EngineConfig(folder))
    kept, plain = (
        TensorStore(setup.source.checkpoint, torch.float32, packed=packed) for packed in (setup.scaled.packed, None)
    )
    name = "model.layers.1.mlp.experts.gate_up_proj"
    entries = [[WeightPiece(name, ((expert, expert + 1), (0, 96), (0, 128)), stacked=True)] for expert in (4, 2)]
    found, x = kept.linear_stack(entries), torch.randn(3, 96)
    assert (
        found.stored.dtype == torch.uint8 and found.stored.shape == (2, 128, 48) and found.scales.shape == (2, 128, 3)
    )
    for linear, entry in zip(found.linears, entries, strict=True):
        torch.testing.assert_close(linear(x), plain.linear(entry)(x))
