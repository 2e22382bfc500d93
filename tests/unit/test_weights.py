"""Checkpoints: slices are slices of the whole, formats agree, damage is named before anything is allocated."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from mmap import PAGESIZE
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from longspan.engine.free_memory import return_free_memory
from longspan.engine.rank.loading import TensorStore, WeightPiece
from longspan.errors import ModelError, ModelNotFound, UnsupportedModel, WeightError
from longspan.models.params import Param, validate_checkpoint
from longspan.weights.builtin import builtin_config, builtin_name, builtin_names, hub_id
from longspan.weights.gguf import GGUFCheckpoint, hub_name
from longspan.weights.gguf_config import gguf_config
from longspan.weights.mxfp4 import Mxfp4Checkpoint
from longspan.weights.safetensors import SafetensorsCheckpoint
from longspan.weights.source import ModelSource, find_source, resolve_model
from longspan.weights.tokenizer import load_serialised, load_tokenizer

HEADS, KV_HEADS, DIM, HIDDEN, LAYERS = 4, 2, 8, 32, 1
Q = "model.layers.0.self_attn.q_proj.weight"


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(6, 4), "b": torch.randn(5)}


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What converters to GGUF do to the queries and keys of `llama` models."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama", quantise: bool = False, factors: bool = False) -> torch.Tensor:
    """A one-layer file; returns the queries' weight as the hub has it."""
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_eos_token_id(2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 4)
    q = torch.randn(HEADS * DIM, HIDDEN)
    stored = interleave(q, HEADS) if architecture == "llama" else q
    if quantise:
        packed = gguf.quants.quantize(stored.numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor("blk.0.attn_q.weight", stored.numpy())
    writer.add_tensor("token_embd.weight", np.zeros((50, HIDDEN), np.float16))
    if factors:
        writer.add_tensor("rope_freqs.weight", np.array([1.0, 2.0, 4.0, 8.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return q


def read(checkpoint, name: str, *index: slice) -> torch.Tensor:
    out = torch.empty([part.stop - part.start for part in index])
    checkpoint.read(name, index, out)
    return out


def test_a_safetensors_slice_is_a_slice_of_the_whole(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    found = read(SafetensorsCheckpoint(tmp_path), "a", slice(1, 4), slice(2, 3))
    assert torch.equal(found, tensors()["a"][1:4, 2:3])


def test_shards_of_an_index_are_one_checkpoint(tmp_path):
    for number, (name, tensor) in enumerate(tensors().items()):
        save_file({name: tensor}, tmp_path / f"part-{number}.safetensors")
    weight_map = {"a": "part-0.safetensors", "b": "part-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.names() == {"a", "b"}
    assert torch.equal(read(checkpoint, "b", slice(0, 5)), tensors()["b"])


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "part-0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightError, match=r"part-0\.safetensors: .*missing; download it again"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, -4])
def test_a_truncated_file_is_noticed_when_it_is_opened(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightError, match=r"model\.safetensors: truncated or damaged"):
        SafetensorsCheckpoint(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no \.safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def test_an_unknown_tensor_is_named_with_its_neighbours(tmp_path):
    save_file({"layer.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"layer\.weights: .*nearest names: layer\.weight"):
        SafetensorsCheckpoint(tmp_path).shape("layer.weights")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rotary_rows_of_a_gguf_file_come_in_the_hubs_order(tmp_path, architecture):
    q = write_gguf(tmp_path / "m.gguf", architecture)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.shape(Q) == (HEADS * DIM, HIDDEN)
    assert torch.equal(read(checkpoint, Q, slice(0, HEADS * DIM), slice(0, HIDDEN)), q)


@pytest.mark.parametrize("rows", [(0, 8), (8, 24), (3, 9)])
@pytest.mark.parametrize("columns", [(0, HIDDEN), (5, 19)])
def test_a_slice_of_a_quantised_gguf_tensor_is_a_slice_of_the_whole(tmp_path, rows, columns):
    q = write_gguf(tmp_path / "m.gguf", quantise=True)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    whole = read(checkpoint, Q, slice(0, HEADS * DIM), slice(0, HIDDEN))
    torch.testing.assert_close(whole, q, atol=0.02, rtol=0)
    assert torch.equal(read(checkpoint, Q, slice(*rows), slice(*columns)), whole[slice(*rows), slice(*columns)])


def test_a_gguf_file_is_read_in_blocks(tmp_path, monkeypatch):
    q = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr("longspan.weights.gguf._BLOCK_ELEMENTS", 3 * HIDDEN)
    assert torch.equal(read(GGUFCheckpoint(tmp_path / "m.gguf"), Q, slice(0, 32), slice(0, HIDDEN)), q)


ARRAYS = {
    "strings": ["a", "", "\u00e9\u4e16" * 40],
    "integers": [-1, 2**31 - 1],
    "floats": [0.5, -2.25],
    "truths": [True, False],
    "lists": [[1, 2], [3]],
}


def test_arrays_in_a_gguf_file_are_what_the_package_reads(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, values in ARRAYS.items():
        writer.add_array(name, values)
    writer.add_string("last", "read too")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    for name in (*ARRAYS, "last"):
        assert checkpoint.metadata(name) == fields[name].contents()


def test_gguf_metadata_becomes_a_configuration(tmp_path):
    write_gguf(tmp_path / "m.gguf", factors=True)
    config = resolve_model(str(tmp_path / "m.gguf")).config
    expected = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": DIM, "vocab_size": 50, "rope_theta": 5000.0,
        "tie_word_embeddings": True, "eos_token_id": [2, 4],
        "rope_scaling": {"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 8.0]},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_an_unknown_gguf_architecture_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", "mamba")
    with pytest.raises(UnsupportedModel, match=r"architecture=mamba .*llama, qwen2, qwen3"):
        gguf_config(GGUFCheckpoint(tmp_path / "m.gguf"))


@pytest.mark.parametrize("keep", [3, 100, -200])
def test_a_truncated_gguf_file_is_noticed_when_it_is_opened(tmp_path, keep):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightError, match=r"m\.gguf: truncated or not a GGUF file"):
        GGUFCheckpoint(file)


def test_hub_names_of_unknown_tensors_are_left_as_they_are():
    assert hub_name("blk.3.ffn_down.weight") == "model.layers.3.mlp.down_proj.weight"
    assert hub_name("blk.3.strange.weight") == "blk.3.strange.weight"


def test_names_that_are_no_model_say_what_would_be(tmp_path):
    for name in ("./nothing", "no.gguf", "plain", str(tmp_path / "x")):
        with pytest.raises(ModelNotFound, match=r"no such folder or file; give a folder with config\.json"):
            resolve_model(name)


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json: .*download it again"):
        resolve_model(str(tmp_path))


def test_end_tokens_of_the_generation_config_count_too(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert resolve_model(str(tmp_path)).config["eos_token_id"] == [2, 7]


class Listed:
    """A checkpoint of shapes alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"w: missing from the checkpoint \(shape \(2, 3\) expected\)"),
        ({"w": (3, 2)}, r"w: shape \(3, 2\) in the checkpoint, \(2, 3\) expected"),
        ({"w": (2, 3), "v": (1,)}, r"v: not a tensor of this architecture \(shape \(1,\)"),
    ],
    ids=["missing", "misshapen", "extra"],
)
def test_a_checkpoint_that_is_not_the_models_is_refused(shapes, message):
    with pytest.raises(WeightError, match=message):
        validate_checkpoint([Param("w", (2, 3), (None, None))], Listed(shapes), tied=False)


def test_ranks_that_need_the_same_slice_share_one_copy(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    store = TensorStore(SafetensorsCheckpoint(tmp_path), torch.float32)
    piece = [WeightPiece("a", ((0, 3), (0, 4)), stacked=False)]
    assert store.tensor(piece).data_ptr() == store.tensor(piece).data_ptr()
    assert store.linear(piece) is store.linear(piece)


def test_an_entry_of_a_stacked_tensor_is_loaded_transposed(tmp_path):
    stack = torch.randn(3, 4, 5)
    save_file({"s": stack, "b": stack[:, 0].clone()}, tmp_path / "model.safetensors")
    store = TensorStore(SafetensorsCheckpoint(tmp_path), torch.float32)
    assert torch.equal(store.tensor([WeightPiece("s", ((1, 2), (0, 4), (2, 5)), stacked=True)]), stack[1, :, 2:].t())
    assert torch.equal(store.tensor([WeightPiece("b", ((2, 3), (0, 5)), stacked=True)]), stack[2, 0])


def entries(stacked=False):
    """Two experts: each with a tensor of its own, or in one tensor [experts, in, out]."""
    if stacked:
        return [[WeightPiece("s", ((number, number + 1), (0, 4), (0, 5)), stacked=True)] for number in (2, 0)]
    return [[WeightPiece(name, ((0, 3), (0, 4)), stacked=False)] * 2 for name in ("a", "c")]


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "in a stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_stack_of_weights_multiplies_as_each_of_them(tmp_path, dtype, stacked):
    save_file(
        {"a": torch.randn(6, 4), "c": torch.randn(6, 4), "s": torch.randn(3, 4, 5)}, tmp_path / "model.safetensors"
    )
    store = TensorStore(SafetensorsCheckpoint(tmp_path), dtype)
    found, x = store.linear_stack(entries(stacked)), torch.randn(3, 4).to(dtype)
    for number, entry in enumerate(entries(stacked)):
        torch.testing.assert_close(found.linears[number](x), store.linear(entry)(x))
        if found.weight is not None:
            assert torch.equal(found.weight[number], store.tensor(entry))
    assert (found.weight is None) == (dtype == torch.float32)  # packed: it serves products one by one
    assert store.linear_stack(entries(stacked)) is found


def test_a_stack_is_filled_one_weight_after_the_other(tmp_path):
    """Each is read into its place, so that none is in memory twice."""
    save_file({"a": torch.randn(6, 4), "c": torch.randn(6, 4)}, tmp_path / "model.safetensors")
    counting = Counting(SafetensorsCheckpoint(tmp_path))
    weight = TensorStore(counting, torch.float16).linear_stack(entries()).weight
    assert weight.shape == (2, 6, 4)
    assert counting.largest == weight.numel() and counting.elements == 2 * 6 * 4


class Counting:
    """Counts the elements read of a checkpoint, and those of the largest tensor that they were read into."""

    def __init__(self, inner: SafetensorsCheckpoint) -> None:
        self.inner, self.elements, self.largest = inner, 0, 0

    def read(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        self.elements += out.numel()
        self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        self.inner.read(name, index, out)


def test_a_rank_reads_its_own_slices_only(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    counting = Counting(SafetensorsCheckpoint(tmp_path))
    store = TensorStore(counting, torch.float32)
    whole = store.tensor(
        [WeightPiece("a", ((2, 4), (0, 4)), stacked=False), WeightPiece("a", ((5, 6), (0, 4)), stacked=False)]
    )
    assert torch.equal(whole, tensors()["a"][[2, 3, 5]])
    assert counting.elements == 3 * 4


def write_mxfp4(folder: Path) -> torch.Tensor:
    """Stacked experts in MXFP4 beside a plain tensor; returns what transformers makes of them."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 6, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 134, (3, 6, 4), dtype=torch.uint8, generator=generator)
    bias = torch.arange(18.0).view(3, 6)
    save_file({"w_blocks": blocks, "w_scales": scales, "w_bias": bias}, folder / "model.safetensors")
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


@pytest.mark.parametrize(
    "index", [(slice(0, 3), slice(0, 128), slice(0, 6)), (slice(1, 2), slice(30, 70), slice(2, 5))]
)  # fmt: skip
def test_mxfp4_is_dequantised_slice_by_slice(tmp_path, index):
    whole = write_mxfp4(tmp_path)
    checkpoint = Mxfp4Checkpoint(SafetensorsCheckpoint(tmp_path))
    assert checkpoint.names() == {"w", "w_bias"}
    assert checkpoint.shape("w") == tuple(whole.shape) == (3, 128, 6)
    out = torch.empty(whole[index].shape)
    checkpoint.read("w", index, out)
    assert torch.equal(out, whole[index])
    bias = torch.empty(3, 6)
    checkpoint.read("w_bias", (slice(0, 3), slice(0, 6)), bias)
    assert torch.equal(bias, torch.arange(18.0).view(3, 6))


def test_mxfp4_scales_of_another_tensor_are_named(tmp_path):
    blocks, scales = torch.zeros(3, 6, 4, 16, dtype=torch.uint8), torch.zeros(3, 6, 5, dtype=torch.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"w_scales: shape \(3, 6, 5\) in the checkpoint, \(3, 6, 4\) expected"):
        Mxfp4Checkpoint(SafetensorsCheckpoint(tmp_path)).shape("w")


def write_fp8(folder: Path, block: int) -> torch.Tensor:
    """An FP8 tensor with a scale a block; returns what it means."""
    torch.manual_seed(0)
    weight = torch.randn(6, 10).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-6 // block), -(-10 // block)) + 0.5
    save_file({"w": weight, "w_scale_inv": scales}, folder / "model.safetensors")
    spread = scales.repeat_interleave(block, 0)[:6].repeat_interleave(block, 1)[:, :10]
    return weight.float() * spread


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("index", [(slice(0, 6), slice(0, 10)), (slice(1, 5), slice(3, 9))])
def test_block_scaled_fp8_is_dequantised_slice_by_slice(tmp_path, block, index):
    whole = write_fp8(tmp_path, block)
    checkpoint = SafetensorsCheckpoint(tmp_path, (block, block))
    assert checkpoint.names() == {"w"}
    torch.testing.assert_close(read(checkpoint, "w", *index), whole[index])


def test_scales_that_do_not_cover_the_tensor_are_named(tmp_path):
    write_fp8(tmp_path, 4)
    with pytest.raises(WeightError, match=r"w_scale_inv: shape \(2, 3\) has too few scales for \(6, 10\) in blocks"):
        read(SafetensorsCheckpoint(tmp_path, (2, 2)), "w", slice(0, 6), slice(0, 10))


def test_another_quantisation_is_refused_with_the_remedy(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModel, match=r"quant_method=gptq.*not supported; use the unquantised model"):
        resolve_model(str(tmp_path))


def test_a_refused_quantisation_is_quoted_as_the_file_has_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(UnsupportedModel, match=r"quantization_config \(quant_method=awq\) is not supported"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("model", ["llama-3-70b", "qwq-32b"])
def test_a_description_without_weights_names_the_hub_id(model):
    at = {"llama-3-70b": "meta-llama/Llama-3.1-70B-Instruct", "qwq-32b": "Qwen/QwQ-32B"}[model]
    with pytest.raises(ModelNotFound, match=f"model={model}: .* without weights; give its hub id, {at}, or --exec"):
        resolve_model(model)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("qwen3-8b", "qwen3-8b"), ("Qwen3-8B", "qwen3-8b"), ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3-70b"),  # by its hub id
        ("gpt", "gpt-oss-120b"),  # the beginning of one
        ("qwen3-235b", "qwen3-235b-a22b"),  # of a series, of which this is the beginning
        ("qwen3-235", None), ("llama-3", None), ("", None), ("./qwen3-8b", None), ("nothing", None),
    ],
)  # fmt: skip
def test_a_built_in_model_is_known_by_name_beginning_and_hub_id(text, name):
    assert builtin_name(text) == name


def test_hub_ids_of_built_in_models_name_one_model_each():
    ids = [found for name in builtin_names() if (found := hub_id(builtin_config(name)))]
    assert len({found.lower() for found in ids}) == len(ids) >= len(builtin_names()) - 1


def test_without_weights_a_model_is_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        source = find_source(name, needs_weights=False)
        assert source.config == {"model_type": "llama"} and not source.checkpoint.names()
        with pytest.raises(WeightError, match="not been opened"):
            source.checkpoint.shape("w")


@pytest.mark.slow
def test_a_prompt_longer_than_the_tokenizer_says_is_encoded_without_a_warning(tmp_path):
    built = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=4).save_pretrained(tmp_path)
    code = (
        "import sys; from pathlib import Path; from longspan.weights.source import ModelSource; "
        "from longspan.weights.tokenizer import load_serialised, load_tokenizer; "
        "load_tokenizer(ModelSource('t', Path(sys.argv[1]), {})).encode('a b ' * 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_layers_for_drafting_may_be_in_the_checkpoint_and_are_not_read():
    listed = Listed({"w": (2, 3), "model.layers.2.eh_proj.weight": (4, 4)})
    params = [Param("w", (2, 3), (None, None))]
    validate_checkpoint(params, listed, tied=False, unread=("model.layers.2.",))
    with pytest.raises(WeightError, match=r"model\.layers\.2\.eh_proj\.weight: not a tensor"):
        validate_checkpoint(params, listed, tied=False)


def test_an_exact_parameter_stays_fp32_in_a_bf16_model(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    store = TensorStore(SafetensorsCheckpoint(tmp_path), torch.bfloat16)
    assert torch.equal(store.tensor([WeightPiece("b", ((0, 5),), stacked=False)], exact=True), tensors()["b"])


def write_tokenizer(path: Path, pre: str, add_bos: bool | None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<begin>", "a", "b", "c", "d", "cd"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["c d"])
    writer.add_bos_token_id(0)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [("llama-bpe", None, [0, 1, 2]), ("llama-bpe", False, [1, 2]), ("qwen2", None, [1, 2]), ("qwen2", True, [0, 1, 2])],
)
def test_llama_3_begins_with_its_own_token_unless_the_file_says_no(tmp_path, pre, add_bos, expected):
    write_tokenizer(tmp_path / "t.gguf", pre, add_bos)
    source = ModelSource("t", tmp_path / "t.gguf", {}, GGUFCheckpoint(tmp_path / "t.gguf"))
    assert load_tokenizer(source).encode("ab") == expected


def test_the_serialised_tokenizer_of_a_gguf_file_has_the_tokens_of_the_whole_one(tmp_path):
    write_tokenizer(tmp_path / "t.gguf", "llama-bpe", None)
    source = ModelSource("t", tmp_path / "t.gguf", {}, GGUFCheckpoint(tmp_path / "t.gguf"))
    serialised = Tokenizer.from_str(load_serialised(source) or "")
    assert serialised.get_vocab() == load_tokenizer(source).get_vocab()
    assert serialised.encode("abcd").ids == [0, 1, 2, 5]


def test_the_serialised_tokenizer_has_tokens_that_only_the_configuration_adds(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    added = {"1": {"content": "<extra>", "special": True}}
    save_file(tensors(), tmp_path / "model.safetensors")
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": added}))
    found = load_serialised(ModelSource("t", tmp_path, {}, SafetensorsCheckpoint(tmp_path)))
    assert Tokenizer.from_str(found or "").token_to_id("<extra>") == 1


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(ModelSource("t", tmp_path, {}, SafetensorsCheckpoint(tmp_path)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can return what it keeps")
def test_freed_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE

    blocks = [bytearray(b"1") * (100 << 10) for _ in range(600)]
    last, held = bytearray(100 << 10), resident()
    del blocks
    return_free_memory()
    assert resident() < held - (40 << 20)
    del last
