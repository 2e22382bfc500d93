"""A family that is passed in: one file with its own layers is enough, whatever the layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan import LLM, ConfigError, SamplingParams
from longspan.config import CostConstants, EngineConfig, ParallelConfig
from longspan.engine.capacity import RankMemory
from longspan.engine.extensions import Extensions
from longspan.engine.setup import resolve
from longspan.errors import UnsupportedModel, WeightError
from longspan.models.config import ModelConfig
from longspan.models.registry import Family, family_of, find_family
from longspan.planner.hardware import hardware
from longspan.weights.formats import WeightFormat
from tests.models import side_by_side
from tests.oracle import prompt_of, tiny_folder

CONFIG = {
    "architectures": list(side_by_side.ARCHITECTURES), "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97,
    "max_position_embeddings": 128,
}  # fmt: skip
FAMILY = family_of(side_by_side)
MODEL = side_by_side.parse(CONFIG, side_by_side.ARCHITECTURES[0])
TOKENS = 10


def write(folder: Path, **changed: torch.Tensor) -> None:
    torch.manual_seed(5)
    tensors = {param.name: torch.randn(param.shape) * 0.4 for param in FAMILY.params(MODEL)}
    save_file({**tensors, **changed}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("side-by-side")
    write(path)
    return path


def plain_tokens(folder: Path, prompt: list[int]) -> list[int]:
    weights, tokens = load_file(folder / "model.safetensors"), list(prompt)
    while len(tokens) < len(prompt) + TOKENS:
        tokens.append(int(side_by_side.logits(weights, MODEL, tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=["tp1", "tp2", "pcp2", "pp2"])
def test_its_tokens_are_those_of_a_plain_forward(folder, layout):
    tp, pcp, pp = layout
    prompts = [prompt_of(length) for length in (5, 90)]
    with LLM(
        str(folder), tensor_parallel_size=tp, prefill_context_parallel_size=pcp, pipeline_parallel_size=pp,
        page_size=4, max_num_batched_tokens=48, max_num_seqs=8, local_context=8, kv_cache_memory_bytes=1 << 20,
        num_threads=1, dtype="float32", cost=CostConstants(), families=[side_by_side],
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == plain_tokens(folder, prompt)


def test_a_family_from_outside_is_known_only_where_it_is_passed_in(folder):
    with pytest.raises(UnsupportedModel, match=r"SideBySideForCausalLM.*not supported; supported are LlamaForCausalLM"):
        resolve(EngineConfig(str(folder)))
    assert resolve(EngineConfig(str(folder)), Extensions(families=(FAMILY,))).family is FAMILY


def test_a_record_does_as_well_as_a_module_and_comes_before_what_is_built_in():
    own = Family(("LlamaForCausalLM",), side_by_side.parse, side_by_side.build)
    assert family_of(own) is own
    assert (
        find_family(
            {**CONFIG, "architectures": ["LlamaForCausalLM"]}, Extensions(families=(own,)).all_families("threads")
        )[0]
        is own
    )


def test_its_checkpoint_is_validated_before_anything_is_loaded(tmp_path):
    write(tmp_path, **{"blocks.1.gate": torch.zeros(2)})
    with pytest.raises(WeightError, match=r"blocks\.1\.gate: not a tensor of this architecture"):
        resolve(EngineConfig(str(tmp_path)), Extensions(families=(FAMILY,)))
    write(tmp_path, **{"blocks.2.up_bias": torch.zeros(2)})
    with pytest.raises(WeightError, match=r"blocks\.2\.up_bias: shape \(2,\) in the checkpoint, \(56,\) expected"):
        resolve(EngineConfig(str(tmp_path)), Extensions(families=(FAMILY,)))


def test_ranks_that_are_other_processes_are_refused(folder):
    with pytest.raises(
        ConfigError, match=r"families=.*executor=processes has its ranks in other processes.*use executor='threads'"
    ):
        LLM(str(folder), tensor_parallel_size=2, executor="processes", families=[side_by_side])


def weight_bytes(family: Family, model: ModelConfig, parallel: ParallelConfig) -> float:
    def build(*given: Any) -> Any:  # no family that is built in has this one
        return family.build(*given)

    return RankMemory(
        model, hardware("h200"), parallel, WeightFormat.named("fp32", "fp32"), 4, build=build
    ).weight_bytes


@pytest.mark.parametrize("name", ["llama-tied", "gpt-oss", "deepseek-v3"])
def test_weights_of_one_rank_are_the_checkpoint_whatever_its_layers_are(name):
    tensors = load_file(Path(tiny_folder(name), "model.safetensors"))
    family, model = find_family(json.loads(Path(tiny_folder(name), "config.json").read_text()))
    assert weight_bytes(family, model, ParallelConfig()) == 4 * sum(tensor.numel() for tensor in tensors.values())


def test_a_rank_may_hold_a_part_of_latent_attentions_heads_and_of_the_experts():
    family, model = find_family(json.loads(Path(tiny_folder("deepseek-v3"), "config.json").read_text()))
    whole = weight_bytes(family, model, ParallelConfig())
    assert 0.5 < weight_bytes(family, model, ParallelConfig(tensor_parallel_size=2)) / whole < 0.6


def test_the_rank_that_holds_most_of_its_weights_counts(folder):
    elements = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    block = sum(count for name, count in elements.items() if name.startswith("blocks.0."))
    last_stage = 2 * block + elements["logits"]
    assert weight_bytes(FAMILY, MODEL, ParallelConfig(pipeline_parallel_size=2)) == 4 * last_stage
    hidden = MODEL.hidden_size  # one rank of two has all norms and positions, half of each block, 49 of 97 tokens
    half = elements["positions"] + 3 * (hidden + (block - hidden) / 2) + 2 * 49 * hidden
    assert weight_bytes(FAMILY, MODEL, ParallelConfig(tensor_parallel_size=2)) == 4 * half
