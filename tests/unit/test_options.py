"""An option is written once, at the field of a config record: flag, keyword, help and default come from there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import get_type_hints

import pytest
import typer

from longspan import LLM
from longspan.cli.main import build_app
from longspan.cli.options import takes_records
from longspan.config import (
    CacheConfig,
    ClusterConfig,
    CostConstants,
    EngineConfig,
    EngineOptions,
    LivenessConfig,
    OffloadConfig,
    ParallelConfig,
    SchedulerConfig,
    Speculation,
    parse_bytes,
)
from longspan.config.option import build, flags, keywords, option
from longspan.errors import ConfigError
from longspan.server.options import RouteOptions, ServeOptions

OF_ENGINE = (("generate",), ("explain",), ("serve",), ("bench", "latency"), ("bench", "throughput"), ("bench", "mixed"))


@dataclass(frozen=True)
class Inner:
    room: int | None = option(None, "how much", name="kv_room", metavar="SIZE", parse=parse_bytes)
    internal: int = 7  # no option


@dataclass(frozen=True)
class Outer:
    depth: int = option(1, "how deep", short="-d")
    careful: bool = option(True, "look first")
    inner: Inner = field(default_factory=Inner)
    late: bool = option(False, "wait")
    python_only: int = option(3, "a keyword", flag=None)


def probed(record, *arguments):
    """The record that a command is called with, and the command."""
    found = []

    def probe(config) -> None:
        found.append(config)

    probe.__annotations__["config"] = record
    app = typer.Typer(add_completion=False)
    app.command()(takes_records(probe))
    command = typer.main.get_command(app)
    command.main(list(arguments), standalone_mode=False)
    return found[0], command


def test_a_field_is_a_flag_with_its_help_and_default_and_one_that_is_no_option_is_none():
    _, command = probed(Outer)
    shown = {(*one.opts, *one.secondary_opts): (one.default, one.help, one.metavar) for one in command.params}
    assert shown == {
        ("--depth", "-d"): (1, "how deep", None),
        ("--careful", "--no-careful"): (True, "look first", None),
        ("--kv-room",): (None, "how much", "SIZE"),
        ("--late",): (False, "wait", None),
    }


def test_a_command_is_called_with_the_record_that_its_flags_make():
    assert probed(Outer)[0] == Outer()
    made, _ = probed(Outer, "-d", "5", "--no-careful", "--kv-room", "2k", "--late")
    assert made == Outer(depth=5, careful=False, inner=Inner(room=2048), late=True)


def test_a_field_is_a_keyword_and_none_leaves_its_default():
    assert [one.name for one in keywords(Outer)] == ["depth", "careful", "kv_room", "late", "python_only"]
    assert build(Outer, {"depth": None, "kv_room": 5, "python_only": 4}) == Outer(inner=Inner(room=5), python_only=4)


@pytest.mark.parametrize("command", OF_ENGINE, ids=" ".join)
def test_every_flag_of_an_engine_is_a_field_of_its_configuration(command):
    found = typer.main.get_command(build_app())
    for name in command:
        found = found.commands[name]
    given = {one.name: one for one in found.params}
    for one in flags(EngineConfig):
        shown = given[one.name]
        assert f"--{one.flag}".replace("_", "-") in shown.opts or one.default is MISSING
        assert shown.help.startswith(one.help)
        assert shown.required if one.default is MISSING else shown.default == one.default


def test_every_keyword_of_an_llm_is_a_field_and_is_listed_with_its_default_and_help():
    parameters = inspect.signature(LLM.__init__).parameters
    fields = {one.name: one for one in keywords(EngineConfig)}
    extensions = [name for name in parameters if name not in fields and name != "self"]
    assert list(parameters) == ["self", *fields, *extensions]
    assert {"schedules", "families"} <= set(extensions)
    assert parameters.keys() >= {"model", "tensor_parallel_size", "kv_cache_memory_bytes", "cluster", "cost"}
    for name, one in fields.items():
        assert name == "model" or parameters[name].default == one.default
        assert name == "model" or f"\n{name}: {one.help}" in LLM.__init__.__doc__


def test_what_type_checkers_read_is_what_the_fields_say():
    accepts_more = {
        "pages_per_shard": Sequence[int] | None, "cudagraph_capture_sizes": Sequence[int] | None,
        "speculative": str | None, "cluster": ClusterConfig | None,
    }  # fmt: skip
    fields = {one.name: accepts_more.get(one.name, one.kind) for one in keywords(EngineConfig) if one.name != "model"}
    assert list(get_type_hints(EngineOptions).items()) == list(fields.items())


def test_what_is_left_out_is_the_same_for_command_line_keywords_and_records():
    assert probed(EngineConfig, "m")[0] == EngineConfig.of("m") == EngineConfig("m")
    assert probed(ServeOptions)[0] == ServeOptions()
    assert probed(RouteOptions)[0] == RouteOptions()


BOTH = {
    "sizes": (
        ["-tp", "4", "-pcp", "2", "-dcp", "2", "-pp", "3"],
        {"tensor_parallel_size": 4, "prefill_context_parallel_size": 2, "decode_context_parallel_size": 2,
         "pipeline_parallel_size": 3},
        {"parallel": ParallelConfig(4, 2, 2, 3)},
    ),
    "bytes": (
        ["--kv-cache-memory-bytes", "1.5M", "--kv-offload-memory", "8G"],
        {"kv_cache_memory_bytes": 3 << 19, "kv_offload_memory": 8 << 30},
        {"cache": CacheConfig(memory_bytes=3 << 19, offload=OffloadConfig(memory_bytes=8 << 30))},
    ),
    "a folder": (
        ["--kv-offload-disk", "/a/b"], {"kv_offload_disk": "/a/b"},
        {"cache": CacheConfig(offload=OffloadConfig(disk="/a/b"))},
    ),
    "a folder with a size": (
        ["--kv-offload-disk", "/a:b:2k"], {"kv_offload_disk": "/a:b", "kv_offload_disk_bytes": 2048},
        {"cache": CacheConfig(offload=OffloadConfig(disk="/a:b", disk_bytes=2048))},
    ),
    "a folder with a colon": (
        ["--kv-offload-disk", "/a:b"], {"kv_offload_disk": "/a:b"},
        {"cache": CacheConfig(offload=OffloadConfig(disk="/a:b"))},
    ),
    "a list": (
        ["--pages-per-shard", "100,80"], {"pages_per_shard": [100, 80]},
        {"cache": CacheConfig(pages_per_shard=(100, 80))},
    ),
    "drafts": (
        ["--speculative", "prompt-lookup:4"], {"speculative": "prompt-lookup:4"},
        {"scheduler": SchedulerConfig(speculative=Speculation("prompt-lookup", 4))},
    ),
    "drafts of a checkpoint with a colon in its path": (
        ["--speculative", "draft:3:/a:b"], {"speculative": "draft:3:/a:b"},
        {"scheduler": SchedulerConfig(speculative=Speculation("draft", 3, "/a:b"))},
    ),
    "switches": (
        ["--no-enable-prefix-caching", "--enforce-eager"], {"enable_prefix_caching": False, "enforce_eager": True},
        {"cache": CacheConfig(enable_prefix_caching=False), "enforce_eager": True},
    ),
    "a cluster": (
        ["--ray-address", "a:1", "--cluster-timeout", "9"], {"cluster": ClusterConfig(ray_address="a:1", timeout=9)},
        {"cluster": ClusterConfig(ray_address="a:1", timeout=9)},
    ),
    "a limit": (["--step-timeout", "2"], {"step_timeout": 2.0}, {"liveness": LivenessConfig(step_timeout=2.0)}),
}  # fmt: skip


@pytest.mark.parametrize("case", BOTH)
def test_flags_and_keywords_make_the_same_record(case):
    arguments, options, record = BOTH[case]
    assert probed(EngineConfig, "m", *arguments)[0] == EngineConfig.of("m", **options) == EngineConfig("m", **record)


def test_constants_come_from_a_file_or_are_given(tmp_path):
    file = tmp_path / "constants.json"
    file.write_text('{"call_s": 2.5}')
    made, _ = probed(EngineConfig, "m", "--cost-constants", str(file))
    assert made == EngineConfig.of("m", cost=CostConstants(call_s=2.5))


@pytest.mark.parametrize(
    ("name", "nearest"), [("tensor_parallel", "tensor_parallel_size"), ("ray_address", None), ("memory_settled", None)]
)
def test_a_keyword_that_is_no_option_is_refused_with_the_nearest_that_is_one(name, nearest):
    with pytest.raises(
        ConfigError, match=re.escape(f"{name}=2: is not an option; the most similar one is {nearest or ''}")
    ):
        LLM("smollm2", **{name: 2})
