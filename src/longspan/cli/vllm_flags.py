"""Flags of `vllm serve` that `longspan serve` does not have by that name: what each becomes, or why it is refused.

It owns the table and the reading of arguments by it; what is left are the command's own options.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer.core
import yaml

from longspan.errors import ConfigError

_READ_HERE = ("--config", "--model")
_ONE = {
    "--served-model-name": "give the one name that clients use",
    "--api-key": "give --api-key-file with a line name:key for each client",
}  # flags that take several values in vLLM and one here: what to do instead
_LISTS = (*_ONE, "--cudagraph-capture-sizes", "--cuda-graph-sizes")  # several values may follow, separated by blanks
DONE = "done anyway"  # nothing has to be said of such a flag


@dataclass(frozen=True)
class VllmFlag:
    """What a flag of vLLM is here."""

    # as on vLLM's command line
    name: str
    # what becomes of it, for people; of a refused one, what is wrong
    note: str
    # whether a value follows it
    has_value: bool = True
    # the option that takes its place; '' drops it
    becomes: str = ""
    # values by vLLM's names; others stay as they are, or are refused if `only` these are known
    values: Mapping[str, str] = field(default_factory=dict)
    # whether values beyond `values` are refused with `remedy`
    only: bool = False
    # what to do instead, for a flag that is refused
    remedy: str = ""
    # reads values of another form; raises `ValueError`
    read: Callable[[str], str] = str

    @property
    def is_refused(self) -> bool:
        """Whether no value of it is taken."""
        return bool(self.remedy) and not self.only

    def taken(self, value: str | None) -> list[str]:
        """The arguments in its place. Raises `ConfigError`."""
        option = self.name.lstrip("-").replace("-", "_")
        refused = self.is_refused or (self.only and value not in self.values)
        if refused:
            raise ConfigError(option, "" if value is None else value, self.note, self.remedy)
        if not self.becomes:
            if self.note != DONE and not self.only:
                given = "" if value is None else f"={value}"
                print(f"warning: {self.name}{given} changes nothing here: {self.note}", file=sys.stderr)
            return []
        if value is None:
            return [self.becomes]
        try:
            return [self.becomes, self.values.get(value, self.read(value))]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            raise ConfigError(option, value, "is not understood", f"use {self.becomes}") from None


def _same(name: str, becomes: str, **how: Any) -> VllmFlag:
    return VllmFlag(name, f"`{becomes}`", becomes=becomes, **how)


def _done(name: str) -> VllmFlag:
    return VllmFlag(name, DONE, False)


def _only(name: str, values: Sequence[str], note: str, remedy: str) -> VllmFlag:
    """What is done anyway with these values, and refused with others."""
    return VllmFlag(name, note, values=dict.fromkeys(values, ""), only=True, remedy=remedy)


def _unused(name: str, note: str, has_value: bool = True) -> VllmFlag:
    return VllmFlag(name, note, has_value)


def _refused(name: str, note: str, remedy: str, has_value: bool = True) -> VllmFlag:
    return VllmFlag(name, note, has_value, remedy=remedy)


def _origins(text: str) -> str:
    """vLLM's JSON list as the list with commas that is taken here."""
    return ",".join(json.loads(text)) if text.startswith("[") else text


def _length(text: str) -> str:
    """vLLM's `32k` (decimal) and `32K` (binary) as a number of tokens."""
    factor = {"k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20}.get(text[-1:])
    return text if factor is None else str(int(float(text[:-1]) * factor))


_DRAFTERS = {
    "ngram": "prompt-lookup",
    "mtp": "mtp",
    "deepseek_mtp": "mtp",
    "glm4_moe_mtp": "mtp",
    "eagle3": "eagle3",
    "draft_model": "draft",
}


def _drafts(text: str) -> str:
    """vLLM's `--speculative-config` as `--speculative`: NAME:K, or NAME:K:MODEL for drafts of a model of their own.

    Without a method it is that of a model which drafts. `--speculative` checks the values.
    """
    values = json.loads(text)
    method = values.get("method") or ("draft_model" if "model" in values else "")
    count = int(values["num_speculative_tokens"])
    model = f":{values['model']}" if method in ("eagle3", "draft_model") else ""
    return f"{_DRAFTERS[method]}:{count}{model}"


_EXECUTORS = {"mp": "processes", "ray": "ray", "uni": "threads", "external_launcher": "external"}
_ONE_INSTANCE = "start several instances with `longspan serve`, and `longspan route` or a load balancer before them"
_NO_LORA = "adapters are not supported"
_MERGE = "merge the adapter into the weights"
_TEXT_ONLY = "models read text only"
_EDIT = "change config.json in a copy of the model's folder"

_FLAGS = (
    _same("--block-size", "--page-size"),
    _same("--dtype", "--dtype", values={"half": "float16", "float": "float32"}),
    VllmFlag("--max-model-len", "32k is 32000, 32K is 32768", becomes="--max-model-len", read=_length),
    _same("--load-format", "--load-format", values=dict.fromkeys(("safetensors", "gguf"), "auto")),
    _same("--distributed-executor-backend", "--executor", values=_EXECUTORS),
    VllmFlag("--worker-use-ray", "`--executor ray`", False, "--executor=ray"),
    _same("--uvicorn-log-level", "--log-level", values={"trace": "debug"}),
    _same("--allowed-origins", "--allowed-origins", read=_origins),
    _same("--cuda-graph-sizes", "--cudagraph-capture-sizes"),
    _same("--speculative-config", "--speculative", read=_drafts),
    VllmFlag("--kv-offloading-size", "GiB of `--kv-offload-memory`", becomes="--kv-offload-memory", read="{}G".format),
    _done("--enable-chunked-prefill"),
    _done("--enable-auto-tool-choice"),
    _done("--disable-log-requests"),
    _done("--no-enable-log-requests"),
    _done("--disable-frontend-multiprocessing"),
    _done("--use-v2-block-manager"),
    _done("--enable-prompt-tokens-details"),
    _only("--tokenizer-mode", ["auto"], "the tokenizer is the fast one of the model's files", "leave it out"),
    _only("--chat-template-content-format", ["auto", "string"], "messages reach the template as text", "leave it out"),
    _only("--response-role", ["assistant"], "answers have the role assistant", "leave it out"),
    _only("--preemption-mode", ["recompute"], "preempted requests are computed again", "leave it out"),
    _only("--task", ["auto", "generate"], "this server generates text and does nothing else", "leave it out"),
    _only("--runner", ["auto", "generate"], "this server generates text and does nothing else", "leave it out"),
    _only("--model-impl", ["auto", "vllm"], "models are those of this package", "leave it out"),
    _only("--data-parallel-size", ["1"], "one server is one instance", _ONE_INSTANCE),
    _only("-dp", ["1"], "one server is one instance", _ONE_INSTANCE),
    _only("--api-server-count", ["1"], "one process serves HTTP", _ONE_INSTANCE),
    _only("--cpu-offload-gb", ["0", "0.0"], "weights stay on their devices", "use more ranks, or --quantization fp8"),
    _unused("--swap-space", "preempted requests are computed again; --kv-offload-memory keeps evicted pages"),
    _unused("--max-seq-len-to-capture", "CUDA graphs serve contexts of any length"),
    _unused("--compilation-config", "models are not compiled; --enforce-eager leaves out CUDA graphs"),
    _unused("--optimization-level", "models are not compiled; --enforce-eager leaves out CUDA graphs"),
    _unused("-O", "models are not compiled; --enforce-eager leaves out CUDA graphs"),
    _unused("--allowed-methods", "web pages of the allowed origins may send GET and POST"),
    _unused("--allowed-headers", "web pages of the allowed origins may send any header"),
    _unused("--max-logprobs", "requests may ask for up to 20"),
    _unused("--stream-interval", "the tokens of every step are sent"),
    _unused("--prefix-caching-hash-algo", "pages are found by one kind of hash"),
    _unused("--disable-cascade-attn", "there is no cascade attention", False),
    _unused("--all2all-backend", "how rows reach experts follows from the devices"),
    _unused("--max-log-len", "prompts are not logged"),
    _unused("--enable-log-requests", "prompts are not logged", False),
    _unused("--max-parallel-loading-workers", "one tensor is loaded at a time"),
    _unused("--guided-decoding-backend", "there is one library for grammars"),
    _unused("--structured-outputs-config", "there is one library for grammars"),
    _unused("--num-scheduler-steps", "--async-scheduling plans ahead"),
    _unused("--dcp-kv-cache-interleave-size", "pages are placed whole, by load"),
    _unused("--cp-kv-cache-interleave-size", "pages are placed whole, by load"),
    _refused("--no-enable-chunked-prefill", "prompts longer than a step are always cut into chunks",
             "raise --max-num-batched-tokens to the longest prompt", False),
    _refused("--trust-remote-code", "code in a model's folder is never run: every family is part of the package",
             "leave it out; `longspan explain MODEL` says whether the model is supported", False),
    _refused("--data-parallel-rank", "one server is one instance", _ONE_INSTANCE),
    _refused("--data-parallel-size-local", "one server is one instance", _ONE_INSTANCE),
    _refused("--data-parallel-address", "one server is one instance", _ONE_INSTANCE),
    _refused("--nnodes", "ranks on other machines are Ray's or torchrun's", "use --executor ray or external"),
    _refused("--node-rank", "ranks on other machines are Ray's or torchrun's", "use --executor ray or external"),
    _refused("--dcp-comm-backend", "what ranks exchange is chosen by step", "use --schedule to force one"),
    _refused("--kv-transfer-config", "instances are paired by roles", "use --role (docs/disaggregation.md)"),
    _refused("--tokenizer-revision", "is not known", "give --tokenizer a folder with that revision"),
    _refused("--code-revision", "code in a model's folder is never run", "leave it out"),
    _refused("--download-dir", "files are kept where huggingface_hub keeps them", "set HF_HOME"),
    _refused("--hf-overrides", "the model's configuration is taken as it is", _EDIT),
    _refused("--rope-scaling", "the model's configuration is taken as it is", _EDIT),
    _refused("--rope-theta", "the model's configuration is taken as it is", _EDIT),
    _refused("--override-generation-config", "is not known",
             "put the values into a generation_config.json, and give its folder to --generation-config"),
    _refused("--reasoning-parser", "reasoning is not told apart from the answer", "leave it out, and split the text"),
    _refused("--enable-reasoning", "reasoning is not told apart from the answer", "leave it out", False),
    _refused("--enable-lora", _NO_LORA, _MERGE, False),
    _refused("--lora-modules", _NO_LORA, _MERGE),
    _refused("--limit-mm-per-prompt", _TEXT_ONLY, "leave it out"),
    _refused("--mm-processor-kwargs", _TEXT_ONLY, "leave it out"),
    _refused("--root-path", "paths begin at /", "let the proxy remove the prefix"),
    _refused("--num-gpu-blocks-override", "pages are counted for each shard", "use --pages-per-shard"),
    _refused("--enable-eplb", "experts stay where they are", "leave it out", False),
    _refused("--allow-credentials", "cookies are not read", "send the key in the header Authorization", False),
    _refused("--middleware", "code of others is not run in the server", "put a proxy before it"),
    _refused("--uds", "HTTP is served over TCP", "use --host 127.0.0.1"),
    _refused("--enable-sleep-mode", "an engine keeps its memory", "end the server, and start it again", False),
    _refused("--calculate-kv-scales", "scales of a quantised cache are those of each token", "leave it out", False),
)  # fmt: skip

VLLM_FLAGS: Mapping[str, VllmFlag] = MappingProxyType({one.name: one for one in _FLAGS})


class ServeCommand(typer.core.TyperCommand):
    """`longspan serve`, which understands the command line of `vllm serve` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click: `args` are what follows the command's name."""
        negations = {name for parameter in self.params for name in parameter.secondary_opts}
        return super().parse_args(ctx, translated(args, negations))


def translated(arguments: Sequence[str], negations: Collection[str] = ()) -> list[str]:
    """Arguments of `vllm serve` as arguments of `longspan serve`. Raises `ConfigError`.

    Those of a file that `--config` names come before the others, which so replace them. `negations` are the flags that
    switch something off. Says on stderr which flags change nothing.
    """
    settings, given = _split_settings(arguments, negations)
    found: list[str] = []
    model: str | None = None
    is_first = bool(given) and not given[0].startswith("-")
    is_named = is_first or any(one.partition("=")[0] == "--model" for one in (*settings, *given))
    rest = [*settings, *given]
    while rest:
        name, value, known = _next_flag(rest)
        if name in _LISTS and value is None:
            value = _listed(name, rest, is_named)
        if name == "--model":
            model = value
        elif known is not None:
            found += known.taken(value)
        else:
            found.append(name if value is None else f"{name}={value}")
    return found if model is None or is_first else [model, *found]


def _listed(name: str, rest: list[str], is_named: bool) -> str | None:
    """The values that follow a flag, with commas; they are taken from `rest`. Raises `ConfigError`.

    Only the first is taken where the model is not named yet, because the next may be the model.
    """
    values: list[str] = []
    while rest and not rest[0].startswith("-") and (is_named or not values):
        values.append(rest.pop(0))
    _require_one(name, values)
    return ",".join(values) if values else None


def _require_one(name: str, values: Sequence[str]) -> None:
    if name in _ONE and len(values) > 1:
        option = name[2:].replace("-", "_")
        raise ConfigError(option, " ".join(values), "are several, and one is taken", _ONE[name])


def _next_flag(rest: list[str]) -> tuple[str, str | None, VllmFlag | None]:
    """Take the next argument from `rest`, with its value if that can be told: (name, value, row of the table)."""
    argument = re.sub(r"^-O(?=\d)", "-O=", rest.pop(0))
    if not argument.startswith("-"):
        return argument, None, None
    name, equals, text = argument.partition("=")
    name = name.replace("_", "-")
    stem, dot, _ = name.partition(".")  # vLLM takes the values of a JSON object one by one, as --stem.name VALUE
    known = VLLM_FLAGS.get(stem)
    if dot and known is not None and known.becomes:
        remedy = f"give {stem} one JSON object with all its values"
        raise ConfigError(name[2:].replace("-", "_"), text, "is a part of an object", remedy)
    takes_value = name in _READ_HERE or (known is not None and known.has_value and name not in _LISTS)
    if not takes_value:
        return name, text if equals else None, known
    if not (equals or rest):
        raise ConfigError(name.lstrip("-").replace("-", "_"), "", "has no value", f"give one after {name}")
    return name, text if equals else rest.pop(0), known


def _split_settings(arguments: Sequence[str], negations: Collection[str]) -> tuple[list[str], list[str]]:
    """The arguments in a file that `--config` names, and all others."""
    settings: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        if rest[0].partition("=")[0] == "--config":
            _, path, _ = _next_flag(rest)
            settings = read_settings(str(path), negations)
        else:
            others.append(rest.pop(0))
    return settings, others


def read_settings(path: str, negations: Collection[str]) -> list[str]:
    """The arguments that a YAML file of vLLM's `--config` stands for. Raises `ConfigError`."""
    remedy = "give a YAML file with a flag's name and its value in each line"
    try:
        values = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("config", path, f"cannot be read ({' '.join(str(error).split())})", remedy) from error
    if not isinstance(values, dict):
        raise ConfigError("config", path, "holds no names and values", remedy)
    found: list[str] = []
    for key, value in values.items():
        name = f"--{str(key).replace('_', '-')}"
        off = f"--no-{name[2:]}"
        if isinstance(value, bool):
            found += [name] if value else [off] if off in negations else []
        elif isinstance(value, dict):
            found += [name, json.dumps(value)]
        elif value is not None:
            values = list(map(str, value)) if isinstance(value, list) else [str(value)]
            _require_one(name, values)
            text = ",".join(values)
            found += [f"{name}={text}"] if name in _LISTS else [name, text]
    return found
