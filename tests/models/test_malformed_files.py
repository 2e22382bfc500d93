"""Files of a model that are damaged or made up: each ends the start at once, with an error a user can act on.

The error names the file, the field, its value and the remedy. Nothing else comes out, whatever a file holds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from longspan import LLM
from longspan.config import EngineConfig
from longspan.engine.setup import resolve
from longspan.errors import LongspanError, ModelError
from longspan.models.registry import find_family
from longspan.server.options import ServeOptions
from longspan.server.run import make_service
from longspan.weights.tokenizer import load_tokenizer
from tests.oracle import FAMILIES, TINY, tiny_folder
from tests.server.running import ascii_folder
from tests.unit.test_weights import write_gguf

BASE = {"architectures": ["LlamaForCausalLM"], **TINY}
SEEDS = 60
ALL_SEEDS = 2000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny Llama."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def problem(model: Path) -> str:
    """What a start of this model says is wrong."""
    with pytest.raises(ModelError) as caught:
        load_tokenizer(resolve(EngineConfig(str(model), executor="threads")).source)
    assert str(model) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def change(folder: Path, **fields: Any) -> None:
    """Other values in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be an integer in 1..4096"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a positive integer"),
    ({"hidden_size": -48}, "hidden_size=-48 must be a positive integer"),
    ({"hidden_size": 10**15}, "hidden_size=1000000000000000 must be an integer in"),
    ({"hidden_size": 48.0}, "hidden_size=48.0 must be"),
    ({"num_attention_heads": 1 << 20, "num_key_value_heads": 1, "head_dim": 1 << 20}, "num_attention_heads=1048576 of"),
    ({"head_dim": 0}, "head_dim=0 must be a positive integer"),
    ({"head_dim": 5}, "head_dim=5 with partial_rotary_factor=1.0 rotates 5"),
    ({"vocab_size": 98}, r"model.embed_tokens.weight: shape (97, 48) in the checkpoint, (98, 48) expected"),
    ({"vocab_size": [97]}, "vocab_size=[97] must be"),
    ({"vocab_size": True}, "vocab_size=True must be"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be at most"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
    ({"attention_bias": 1}, "attention_bias=1 must be true or false"),
    ({"eos_token_id": "x"}, "config.json: eos_token_id='x' is no token id"),
    ({"eos_token_id": [1, -2]}, "eos_token_id=[-2, 1] must be a token id or a list of them"),
    ({"eos_token_id": [1, 97]}, "eos_token_id=[1, 97] is not in 0..96"),
    ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list of names"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures=[['LlamaForCausalLM']] must be a list of names"),
    ({"architectures": 5}, "architectures=5 must be a list of names"),
    ({"rope_parameters": None, "rope_scaling": [1]}, "rope_scaling=[1] must be an object"),
    ({"rope_parameters": "linear"}, "rope_parameters='linear' must be an object"),
    ({"rope_parameters": {"rope_type": {}}}, "rope_parameters.rope_type={} is a rope of some layers only"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "rope_parameters: factor='4' must be a positive"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters: factor=0 must be a positive"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": -1}},
     "original_max_position_embeddings=-1 must be"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4,
                          "original_max_position_embeddings": 64}}, "low_freq_factor=4 must be below"),
    ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta=0.5 must be a number above 1"),
    ({"rope_parameters": {"partial_rotary_factor": 3}}, "partial_rotary_factor=3 must be at most 1"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": "x"}}, "rope_scaling: factor='x' must be a"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": None}}, "rope_scaling.factor is missing"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
     "rope_scaling={'factor': 4.0, 'type': 'yarn'} contradicts rope_parameters"),
    ({"hidden_size": 49, "head_dim": None}, "hidden_size=49 is no multiple of num_attention_heads=24"),
    ({"quantization_config": [1]}, "quantization_config=[1] is no object"),
    ({"quantization_config": {"weight_block_size": [0, 0]}}, "weight_block_size=[0, 0]) is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), CONFIGS, ids=[f"{fields}"[:70] for fields, _ in CONFIGS])
def test_a_wrong_field_of_a_configuration_is_named_with_its_value(folder: Path, fields: dict[str, Any], said: str):
    change(folder, **fields)
    found = problem(folder)
    assert said in found
    assert any(remedy in found for remedy in ("fix", "download it again", "use ", "belong to different models"))


OTHERS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "qwen3-moe": [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 exceeds the 6 experts"),
        ({"num_experts": 1 << 20, "num_local_experts": 1 << 20}, "experts each are more than"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers='0' must be a list of integers"),
        ({"mlp_only_layers": [[0]]}, "mlp_only_layers=[[0]] must be"),
    ],
    "deepseek-v3": [
        ({"n_group": 4}, "n_group=4 must divide the 6 experts"),
        ({"scoring_func": "tanh"}, "scoring_func='tanh' must be one of softmax, sigmoid"),
        ({"first_k_dense_replace": "1"}, "first_k_dense_replace='1' must be an integer"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be an integer"),
    ],
    "glm4-moe": [
        ({"use_qk_norm": 1}, "use_qk_norm=1 must be true or false"),
        ({"topk_group": 4}, "n_group=3 must divide the 6 experts and be at least topk_group=4"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "rotates 0 elements of a head"),
    ],
    "mistral": [
        ({"sliding_window": "all"}, "sliding_window='all' must be"),
        ({"sliding_window": 8, "layer_types": [[1], {}]}, "layer_types=[1] is not supported"),
        ({"sliding_window": 8, "layer_types": {"a": 1}}, "layer_types={'a': 1} must list"),
    ],
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_wrong_field_of_another_family_is_named_with_its_value(tmp_path: Path, family: str):
    for number, (fields, said) in enumerate(OTHERS[family]):
        folder = Path(shutil.copytree(tiny_folder(family), tmp_path / str(number)))
        change(folder, **fields)
        assert said in problem(folder), fields


def index(**weight_map: Any) -> str:
    return json.dumps({"weight_map": weight_map})


INDEX = "model.safetensors.index.json"
FILES: list[tuple[str, str, str | bytes, str]] = [
    ("no JSON", "config.json", "{", "config.json: is not readable as JSON"),
    ("nested", "config.json", '{"a":' + "[" * 100_000, "config.json: is not readable as JSON"),
    ("nested and whole", "config.json", "[" * 100_000 + "]" * 100_000, "config.json: is not readable as JSON"),
    ("no UTF-8", "config.json", b'{"a": "\xff"}', "config.json: is not readable as JSON"),
    ("long number", "config.json", '{"a": ' + "9" * 5000 + "}", "config.json: is not readable as JSON"),
    ("empty", "config.json", "", "config.json: is not readable as JSON"),
    ("end token", "generation_config.json", '{"eos_token_id": {}}', "generation_config.json: eos_token_id={} is no"),
    ("end tokens", "generation_config.json", '{"eos_token_id": [1, "2"]}', "eos_token_id=[1, '2'] is no"),
    ("no object", "generation_config.json", "[]", "generation_config.json: holds no JSON object"),
    ("number for a file", INDEX, index(a=1), f"{INDEX}: weight_map.a=1 is not the name of"),
    ("list for a file", INDEX, index(a=["x"]), "weight_map.a=['x'] is not the name of"),
    ("file above", INDEX, index(a="../model.safetensors"), "weight_map.a='../model.safetensors' is not the name of"),
    ("file elsewhere", INDEX, index(a="/etc/passwd"), "weight_map.a='/etc/passwd' is not the name of"),
    ("folder", INDEX, index(a=".."), "weight_map.a='..' is not the name of"),
    ("no name", INDEX, index(a=""), "weight_map.a='' is not the name of"),
    ("file that is not there", INDEX, index(a="b.safetensors"), "b.safetensors: a file named by the index is missing"),
    ("list of files", INDEX, '{"weight_map": ["a"]}', "weight_map=['a'] lists no files"),
    ("no files", INDEX, "{}", "weight_map=None lists no files"),
    ("nested index", INDEX, '{"weight_map":' * 50_000, f"{INDEX}: is not readable as JSON"),
    ("header of 2^60 bytes", "model.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "truncated or damaged"),
    ("header that is no JSON", "model.safetensors", struct.pack("<Q", 4) + b"nope", "truncated or damaged"),
    ("tensor of 2^60 bytes", "model.safetensors",
     struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'[:70],
     "truncated or damaged"),
    ("tokenizer that is no JSON", "tokenizer.json", "{", "its tokenizer cannot be loaded"),
    ("tokenizer without a model", "tokenizer.json", '{"version": "1.0"}', "its tokenizer cannot be loaded"),
    ("tokenizer that is code", "tokenizer_config.json",
     '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["x.X", null]}}', "its tokenizer cannot be loaded"),
    ("nested tokenizer", "tokenizer.json", '{"model":' * 10_000, "its tokenizer cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_malformed_file_is_named(folder: Path, name: str, content: str | bytes, said: str):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = problem(folder)
    assert said in found
    assert "; " in found


def test_a_truncated_file_of_weights_is_named(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model.safetensors: truncated or damaged" in problem(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_file_much_larger_than_any_of_its_kind_is_not_read(folder: Path, name: str):
    (folder / "tokenizer.json").touch()
    with (folder / name).open("wb") as file:
        file.truncate(300 << 20)  # nothing is written
    assert f"{name}: holds {300 << 20} bytes" in problem(folder)


def test_weights_that_are_a_pipe_are_not_waited_for(folder: Path):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "model.safetensors: is no file" in problem(folder)


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.", "{% for %}", "{{ a | nothing }}"])
def test_a_chat_template_that_is_no_jinja_ends_the_start(tmp_path: Path, template: str):
    folder = Path(shutil.copytree(ascii_folder(), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    said = rf"{folder}: chat_template=.* is no Jinja \(Template\w+ in line 1: .*\); correct it, or"
    with pytest.raises(ModelError, match=said):
        LLM(str(folder), num_threads=1)
    with pytest.raises(ModelError, match=said):
        make_service(EngineConfig(str(folder)), ServeOptions())


def gguf_with(path: Path, **fields: Any) -> Path:
    """A whole GGUF file with these metadata fields, which may be of any type."""
    writer = gguf.GGUFWriter(path, "llama")
    known = {
        "block_count": 1, "context_length": 128, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    for name, value in {**{f"llama.{name}": value for name, value in known.items()}, **fields}.items():
        kind = {str: writer.add_string, int: writer.add_int64, float: writer.add_float32, list: writer.add_array}
        kind[type(value)](name, value)
    writer.add_tensor("token_embd.weight", np.zeros((50, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"llama.attention.head_count": 0}, "llama.attention.head_count=0 must be a positive integer"),
    ({"llama.attention.head_count": "4"}, "llama.attention.head_count='4' must be a positive integer"),
    ({"llama.embedding_length": -1}, "llama.embedding_length=-1 must be"),
    ({"llama.block_count": 1 << 40}, "num_hidden_layers=1099511627776 must be"),
    ({"llama.block_count": [1, 2]}, "llama.block_count=[1, 2] must be"),
    ({"llama.rope.freq_base": "x"}, "rope_theta='x' must be"),
    ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id='x' is no token id"),
    ({"split.count": "x"}, "one of several split"),
]


@pytest.mark.parametrize(("fields", "said"), GGUF_FIELDS, ids=[f"{fields}"[:60] for fields, _ in GGUF_FIELDS])
def test_a_wrong_field_of_a_gguf_file_is_named_with_its_value(tmp_path: Path, fields: dict[str, Any], said: str):
    assert said in problem(gguf_with(tmp_path / "m.gguf", **fields))


def with_bytes(file: Path, place: int, part: bytes) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + part + whole[place + len(part) :])


# magic, version, number of tensors, number of fields; then the first field's name and type
HEADS = {
    "wrong magic": (0, b"GGML"),
    "another version": (4, struct.pack("<I", 99)),
    "2^40 tensors": (8, struct.pack("<Q", 1 << 40)),
    "2^40 fields": (16, struct.pack("<Q", 1 << 40)),
    "a name of 2^60 bytes": (24, struct.pack("<Q", 1 << 60)),
}


@pytest.mark.parametrize(("place", "part"), HEADS.values(), ids=HEADS)
def test_a_gguf_file_with_a_wrong_head_is_named(tmp_path: Path, place: int, part: bytes):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    with_bytes(file, place, part)
    assert "m.gguf: truncated or not a GGUF file" in problem(file)


@pytest.mark.parametrize("length", [1 << 50, 1 << 30, 20_000])
def test_an_array_that_is_longer_than_its_gguf_file_is_not_read_to_its_end(tmp_path: Path, length: int):
    file = gguf_with(tmp_path / "m.gguf", a=[True, False, True])
    head = b"a" + struct.pack("<II", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL)
    with_bytes(file, file.read_bytes().index(head) + len(head), struct.pack("<Q", length))
    assert "m.gguf: truncated or not a GGUF file" in problem(file)


@pytest.mark.parametrize("sizes", [(1 << 50, 1), (1 << 32, 1 << 32), (0, 50), (31, 50)])
def test_a_tensor_that_is_larger_than_its_gguf_file_is_not_read(tmp_path: Path, sizes: tuple[int, int]):
    file = gguf_with(tmp_path / "m.gguf")
    with_bytes(file, file.read_bytes().index(struct.pack("<QQ", 32, 50)), struct.pack("<QQ", *sizes))
    problem(file)


@pytest.mark.parametrize("offset", [7, 1 << 40, (1 << 64) - 32])
def test_a_tensor_whose_place_is_none_is_not_read(tmp_path: Path, offset: int):
    file = gguf_with(tmp_path / "m.gguf")
    sizes = struct.pack("<QQ", 32, 50)  # the type and the offset follow
    with_bytes(file, file.read_bytes().index(sizes) + len(sizes) + 4, struct.pack("<Q", offset))
    assert f"the tensor token_embd.weight has offset {offset}, which must be a multiple of 32" in problem(file)


def test_gguf_files_with_any_byte_changed_are_read_or_refused(tmp_path: Path):
    source, whole, refused = random.Random(3), gguf_with(tmp_path / "m.gguf", **TOKENIZER).read_bytes(), 0
    head = whole.index(b"token_embd") + 60
    for number in range(SEEDS):
        file = tmp_path / f"{number}.gguf"
        changed = bytearray(whole)
        for _ in range(source.choice([1, 1, 4])):
            changed[source.randrange(head)] = source.choice([0, 1, 127, 255, source.randrange(256)])
        file.write_bytes(changed)
        refused += is_refused(file)
    assert refused > SEEDS // 2


TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": 3,
}  # fmt: skip
TOKENIZERS: list[dict[str, Any]] = [
    {"tokenizer.ggml.tokens": 5}, {"tokenizer.ggml.tokens": [1, 2]}, {"tokenizer.ggml.token_type": [1]},
    {"tokenizer.ggml.merges": ["a"]}, {"tokenizer.ggml.merges": ["x y"]}, {"tokenizer.ggml.bos_token_id": 99},
    {"tokenizer.ggml.model": "llama"}, {"tokenizer.ggml.pre": "none such"},
]  # fmt: skip


@pytest.mark.parametrize("fields", TOKENIZERS, ids=lambda fields: f"{fields}"[:60])
def test_a_malformed_tokenizer_of_a_gguf_file_is_named(tmp_path: Path, fields: dict[str, Any]):
    from longspan.weights.source import find_source

    file = gguf_with(tmp_path / "m.gguf", **{**TOKENIZER, **fields})
    with pytest.raises(ModelError, match=r"its tokenizer cannot be loaded \(.*\); download it again|is not supported;"):
        load_tokenizer(find_source(str(file)))


def is_refused(model: Path) -> bool:
    """Whether a start of the model raises an error of the tree; one of another kind is raised."""
    try:
        load_tokenizer(resolve(EngineConfig(str(model), executor="threads")).source)
    except LongspanError:
        return True
    return False


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**63, 10**30, 0.0, -0.5, 0.5, 1.5, 1e300, float("nan"), float("inf"),
    "", "a", "2", "\ud800", [], [0], [1, 2], ["a"], [None], [[1]], [-1], [10**12], {}, {"a": 1}, {"rope_type": "yarn"},
    {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3"}, {"rope_type": "yarn", "factor": 1e300},
    {"type": ["x"]}, {"factors": [1.0, "2"], "rope_type": "factors"}, {"rope_type": "factors", "factors": [1.0] * 2},
    ["sliding_attention", "full_attention"], ["sliding_attention", 5], "softmax", ["LlamaForCausalLM"],
    ["DeepseekV3ForCausalLM"], {"quant_method": "fp8"}, {"quant_method": "mxfp4"}, {"quant_method": 5},
    {"weight_block_size": ["a", "b"]},
]  # fmt: skip


def wrong_config(seed: int) -> dict[str, Any]:
    """A family's config.json with one to three fields replaced, or one removed."""
    source = random.Random(seed)
    values = json.loads((Path(tiny_folder(source.choice(FAMILIES).name)) / "config.json").read_text())
    for name in source.sample(sorted(values), source.choice([1, 1, 2, 3])):
        values[name] = source.choice(HOSTILE)
        if source.random() < 0.1:
            del values[name]
    if source.random() < 0.2:
        name = source.choice(["rope_scaling", "sliding_window", "layer_types", "quantization_config", "head_dim"])
        values[name] = source.choice(HOSTILE)
    return values


def check_wrong_configs(seeds: range) -> int:
    """How many are refused; an error that is not of the tree is raised, with the configuration."""
    refused = 0
    for seed in seeds:
        values = wrong_config(seed)
        try:
            family, config = find_family(values)
            family.params(config)
        except LongspanError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {values}") from error
    return refused


def test_configurations_with_random_fields_are_read_or_refused():
    assert check_wrong_configs(range(SEEDS)) > SEEDS // 4


@pytest.mark.exhaustive
def test_two_thousand_configurations_with_random_fields_are_read_or_refused():
    assert check_wrong_configs(range(ALL_SEEDS)) > ALL_SEEDS // 4
