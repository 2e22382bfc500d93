"""The command line of `vllm serve` is taken by `longspan serve`, flag by flag, or refused by name with a remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer

from longspan import LLM, SamplingParams
from longspan.cli.main import build_app
from longspan.cli.vllm_flags import DONE, VLLM_FLAGS, translated
from longspan.errors import ConfigError, ModelNotFound
from longspan.server.served import generation_defaults, read_template
from longspan.weights.checkpoint import RandomWeights
from tests.oracle import tiny_folder
from tests.server.running import ascii_folder

TAKEN = {
    "a page size": ("m --block-size 32", "m --page-size 32"),
    "with an equals sign": ("m --block-size=32", "m --page-size 32"),
    "underscores": ("m --tensor_parallel_size 2 --api-key=a_b", "m --tensor-parallel-size 2 --api-key=a_b"),
    "a dtype by vLLM's name": ("m --dtype half", "m --dtype float16"),
    "a dtype by its own": ("m --dtype bfloat16", "m --dtype bfloat16"),
    "lengths": ("m --max-model-len 32k --max-model-len 1.5K", "m --max-model-len 32000 --max-model-len 1536"),
    "a level of the log": ("m --uvicorn-log-level trace", "m --log-level debug"),
    "an executor": ("m --distributed-executor-backend mp", "m --executor processes"),
    "host memory for pages": ("m --kv-offloading-size 4", "m --kv-offload-memory 4G"),
    "Ray, as it was": ("m --worker-use-ray", "m --executor=ray"),
    "origins as JSON": ('m --allowed-origins ["*"]', "m --allowed-origins *"),
    "n-grams": (
        'm --speculative-config {"method":"ngram","num_speculative_tokens":4}', "m --speculative prompt-lookup:4"
    ),
    "drafts of the model's own layers": (
        'm --speculative-config {"method":"mtp","num_speculative_tokens":1}', "m --speculative mtp:1"
    ),
    "the same by DeepSeek's name": (
        'm --speculative-config {"method":"deepseek_mtp","num_speculative_tokens":2}', "m --speculative mtp:2"
    ),
    "drafts of an EAGLE-3 head": (
        'm --speculative-config {"method":"eagle3","model":"a/b","num_speculative_tokens":3}',
        "m --speculative eagle3:3:a/b",
    ),
    "drafts of a small model": (
        'm --speculative-config {"model":"/m:1","num_speculative_tokens":5}', "m --speculative draft:5:/m:1"
    ),
    "what is done anyway": ("m --enable-chunked-prefill --disable-log-requests --enable-auto-tool-choice", "m"),
    "values that change nothing": ("m -dp 1 --task generate --tokenizer-mode auto --cpu-offload-gb 0", "m"),
    "the model as an option": ("--model m --port 1", "m --port 1"),
    "a list separated by blanks": (
        "m --cudagraph-capture-sizes 1 2 4 --port 1", "m --cudagraph-capture-sizes=1,2,4 --port 1"
    ),
    "such a list by an older name": ("--model m --cuda-graph-sizes 1 2", "m --cudagraph-capture-sizes 1,2"),
    "such a list by an equals sign": (
        "--cudagraph-capture-sizes=1 m", "--cudagraph-capture-sizes=1 m"
    ),
    "one of a list before the model": ("--served-model-name a m", "--served-model-name=a m"),
    "what it has itself": ("m --seed -1 --enable-prefix-caching", "m --seed -1 --enable-prefix-caching"),
}  # fmt: skip
REFUSED = {
    "--trust-remote-code": "trust_remote_code: code in a model's folder is never run",
    "--data-parallel-size 4": "data_parallel_size=4: one server is one instance; start several instances with",
    "-dp 2": "dp=2: one server",
    "--no-enable-chunked-prefill": "no_enable_chunked_prefill: .*; raise --max-num-batched-tokens",
    "--num-gpu-blocks-override 9": "num_gpu_blocks_override=9: .*use --pages-per-shard",
    "--enable-lora": "enable_lora: adapters are not supported; merge",
    "--task embed": "task=embed: this server generates text",
    "--kv-transfer-config {}": "kv_transfer_config={}: .*--role",
    "--speculative-config {}": "speculative_config={}: is not understood; use --speculative",
    "--speculative-config 5": "speculative_config=5: is not understood",
    '--speculative-config {"method":"medusa","num_speculative_tokens":1}': "speculative_config=.*: is not understood",
    '--speculative-config {"method":"eagle3","num_speculative_tokens":1}': "speculative_config=.*: is not understood",
    '--speculative-config {"method":"mtp"}': "speculative_config=.*: is not understood",
    "--allowed-origins [": r"allowed_origins=\[: is not understood",
    "--block-size": "block_size: has no value",
    "--allowed-origins [1]": r"allowed_origins=\[1\]: is not understood",
    "--max-model-len infk": "max_model_len=infk: is not understood",
    "--served-model-name a b --port 1": "served_model_name=a b: are several, and one is taken; give the one name",
    "--api-key a b": "api_key=a b: are several, and one is taken; give --api-key-file",
    "--speculative-config.method ngram": "speculative_config.method: is a part of an object; give --speculative-config",
    "--middleware a.b": "middleware=a.b: code of others",
    "--config /nowhere.yaml": "config=/nowhere.yaml: cannot be read",
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_flag_of_vllm_becomes_what_it_means_here(case, capsys):
    given, expected = TAKEN[case]
    assert translated(given.split()) == expected.split()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", REFUSED)
def test_a_flag_that_means_nothing_here_is_refused_by_name_with_a_remedy(given):
    with pytest.raises(ConfigError, match=f"^{REFUSED[given]}"):
        translated(["m", *given.split()])


@pytest.mark.parametrize("given", ["-O3", "-O 3", "-O.level=3", "--compilation-config.level 3"])
def test_levels_of_optimisation_change_nothing(given, capsys):
    assert translated(["m", *given.split()]) == ["m"]
    assert "models are not compiled" in capsys.readouterr().err


def test_a_flag_that_changes_nothing_is_dropped_with_a_warning(capsys):
    assert translated(["m", "--swap-space", "4", "--max-log-len", "9"]) == ["m"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: --swap-space=4 changes nothing here: ") and "--kv-offload-memory" in first
    assert second == "warning: --max-log-len=9 changes nothing here: prompts are not logged"


def test_every_row_of_the_table_is_taken_or_refused_in_one_way():
    for flag in VLLM_FLAGS.values():
        value = next(iter(flag.values), "1") if flag.has_value else None
        if flag.is_refused:
            with pytest.raises(ConfigError):
                flag.taken(value)
        elif flag.name not in ("--speculative-config",):
            assert flag.taken(value)[:1] in ([], [flag.becomes])
        assert flag.note == DONE or flag.becomes or flag.is_refused or not flag.note.endswith(".")


def test_options_that_take_the_place_of_a_flag_exist_and_no_flag_hides_one():
    options = {name for one in typer.main.get_command(build_app()).commands["serve"].params for name in one.opts}
    for flag in VLLM_FLAGS.values():
        assert not flag.becomes or flag.becomes.partition("=")[0] in options
        assert flag.name not in options or flag.becomes == flag.name


def test_a_file_of_settings_comes_before_the_flags_that_replace_them(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: a/b\nport: 123\nenable_prefix_caching: false\ntrust-remote-code: false\nenforce-eager: true\n"
        "block-size: 8\nallowed-origins: [https://a, https://b]\nspeculative-config: {method: ngram, "
        "num_speculative_tokens: 4}\n"
    )
    settings = [
        "--port", "123", "--no-enable-prefix-caching", "--enforce-eager", "--page-size", "8",
        "--allowed-origins", "https://a,https://b", "--speculative", "prompt-lookup:4",
    ]  # fmt: skip
    negations = {"--no-enable-prefix-caching"}
    assert translated(["--config", str(file), "--port", "5"], negations) == ["a/b", *settings, "--port", "5"]
    assert translated(["m", f"--config={file}"], negations) == [*settings, "m"]
    file.write_text("served-model-name: a\ncuda-graph-sizes: [1, 2]")
    assert translated(["m", "--config", str(file)]) == [
        "--served-model-name=a",
        "--cudagraph-capture-sizes",
        "1,2",
        "m",
    ]
    file.write_text("api-key: [a, b]")
    with pytest.raises(ConfigError, match="api_key=a b: are several"):
        translated(["m", "--config", str(file)])
    file.write_text("- port")
    with pytest.raises(ConfigError, match=r"config=.*: holds no names and values"):
        translated(["--config", str(file)])


def test_the_serve_command_reads_its_arguments_so(tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text("block-size: 8\nport: 1\n")
    command = typer.main.get_command(build_app()).commands["serve"]
    given = command.make_context("serve", ["m", "--config", str(file), "--port", "2", "--dtype", "half"]).params
    assert (given["model"], given["page_size"], given["port"], given["dtype"]) == ("m", 8, 2, "float16")


# --- options that vLLM has by the same name -----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "deepseek-v3", "gpt-oss"])
def test_dummy_weights_need_a_config_alone(name, tmp_path):
    (tmp_path / "config.json").write_text(Path(tiny_folder(name), "config.json").read_text())
    with LLM(str(tmp_path), load_format="dummy", num_threads=1, tensor_parallel_size=2) as llm:
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=5))[0].outputs[0].token_ids) == 5


def test_dummy_weights_are_the_same_for_the_same_slice_of_the_same_tensor():
    def read(name: str, start: int) -> list[float]:
        out = torch.empty(4, 2)
        RandomWeights().read(name, (slice(start, start + 4), slice(0, 2)), out)
        return out.flatten().tolist()

    assert read("a", 0) == read("a", 0) != read("a", 4)
    assert read("a", 0) != read("b", 0)
    assert len(set(read("a", 0))) == 8


def test_a_tokenizer_may_come_from_another_folder():
    with LLM(tiny_folder("llama"), tokenizer=ascii_folder(), num_threads=1) as llm:
        (output,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=3))
    assert output.prompt_token_ids == [65, 66, 67] and len(output.outputs[0].text) == 3
    for missing in ("./nowhere", tiny_folder("llama")):
        with pytest.raises(ModelNotFound, match=f"tokenizer={re.escape(missing)}: "):
            LLM(tiny_folder("llama"), tokenizer=missing, executor="dry")


def test_a_revision_is_that_of_the_hub(monkeypatch):
    asked = []

    def fetch(model, revision, **_):
        asked.append((model, revision))
        return tiny_folder("llama")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with LLM("some/model", revision="v1", num_threads=1) as llm:
        assert len(llm.generate([1], SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2
    assert set(asked) == {("some/model", "v1")}
    assert len(asked) == 2  # small files first, then the weights


def test_defaults_of_sampling_are_read_from_the_models_folder_or_another_or_from_none(tmp_path):
    assert generation_defaults("vllm", tmp_path) == generation_defaults("auto", tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 3, "min_p": null}')
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert generation_defaults("auto", tmp_path) == expected
    assert generation_defaults(str(tmp_path), tmp_path / "other") == expected
    for text in ('{"temperature": "hot"}', '{"top_p": 7}', "[1]", "{"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"generation_config=auto: .*generation_config.json cannot be used"):
            generation_defaults("auto", tmp_path)
    with pytest.raises(ConfigError, match=r"generation_config=/nowhere: .*give auto, vllm, or a folder"):
        generation_defaults("/nowhere", tmp_path)


def test_a_chat_template_is_a_file_or_a_line_of_jinja(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "own.jinja")) == read_template("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"chat_template=/nowhere.jinja: cannot be read .*give a file of Jinja"):
        read_template("/nowhere.jinja")
    with pytest.raises(
        ConfigError, match=r"chat_template='{% for %}': is no Jinja \(TemplateSyntaxError in line 1.*give"
    ):
        read_template("{% for %}")
