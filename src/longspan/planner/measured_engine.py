"""What attention and the host take in the engine's own steps, with models that are little else.

It owns these models and the steps that are timed; a difference of two depths leaves what a layer takes. It must not
know how times are predicted from that.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from longspan.clock import repeated, seconds
from longspan.config import CacheConfig, EngineConfig, Fixed, ParallelConfig, SchedulerConfig
from longspan.engine.engine import Engine
from longspan.models.registry import find_family, load_config
from longspan.planner.measured_layers import LayerBench
from longspan.planner.timing import Bench, typical
from longspan.request import SamplingParams

_WIDTH = 64
_DEPTHS = (1, 9)
_SHORT, _LONG = 448, 4096  # tokens before a decode step
_CHUNK, _CHUNKS = 2048, 2  # new tokens of a prompt in a step, and steps
_BRIEF = 512  # tokens of a prompt
_STEPS = 24
_PROMPTS = 3
_MANY = 8  # requests
_LEAST = 1e-12
_CACHE_BYTES = 1 << 28


@dataclass(frozen=True)
class EngineTimes:
    """Seconds of the host a step; of a layer in the engine beside its kernels; of an attention call; of a byte of keys
    and values; of an operation of attention; of a row of it beside its operations."""

    step_s: float
    layer_s: float
    call_s: float
    read_s: float
    flop_s: float
    row_s: float


@dataclass(frozen=True)
class _Steps:
    """Seconds of a decode step after a short and after a long prompt, and of all steps of a brief and a whole one."""

    short: float
    long: float
    brief: float
    whole: float

    def a_layer(self, deeper: _Steps) -> _Steps:
        """What a layer takes, by another engine with more of them."""
        layers = _DEPTHS[1] - _DEPTHS[0]
        both = zip(astuple(self), astuple(deeper), strict=True)
        return _Steps(*((more - less) / layers for less, more in both))


class EngineBench:
    """Engines with made-up models: thin ones, in which attention takes most, and one as wide as another model."""

    def __init__(self, bench: Bench, values: Mapping[str, Any], executor: str, layers: LayerBench) -> None:
        self._bench, self._values, self._executor, self._layers = bench, values, executor, layers
        self._thin = load_config(plain(values, 1, _WIDTH))
        self._long = min(_LONG, self._thin.max_position_embeddings - 2 * _STEPS)
        self._short = min(_SHORT, self._long // 2)
        self._chunk = min(_CHUNK, self._long // _CHUNKS)
        self._brief = min(_BRIEF, self._chunk // 2)
        self._step_s = self._context_s = 0.0

    def measure(self) -> EngineTimes:
        """Of one rank that has the machine."""
        row_bytes = 2 * self._thin.num_kv_heads * self._thin.head_dim * self._bench.dtype.itemsize
        layers = LayerBench(self._bench, self._thin)
        shallow, deep = map(self._thin_steps, _DEPTHS)
        layer = shallow.a_layer(deep)
        read = max(layer.long - layer.short, _LEAST) / ((self._long - self._short) * row_bytes)
        self._step_s = max(shallow.short - layer.short - layers.logits(1), 0.0)
        self._context_s = self._short * row_bytes * read
        pair, row = self._prompt_rates(layer, layers)
        kernels = [self._kernels(rows) for rows in (1, _MANY)]
        with self._engine(self._layers.deep, None) as wide:
            one, many = (self._beside(wide, n, own) for n, own in zip((1, _MANY), kernels, strict=True))
        call = max((many - one) / (_MANY - 1) - self._context_s, _LEAST)
        return EngineTimes(
            step_s=self._step_s,
            layer_s=max(one - call - self._context_s, 0.0),
            call_s=call,
            read_s=read,
            flop_s=pair / (4 * self._thin.num_q_heads * self._thin.head_dim),
            row_s=row,
        )

    def _prompt_rates(self, layer: _Steps, layers: LayerBench) -> tuple[float, float]:
        """Seconds of a pair of query and key, and of a row beside that, from attention of two lengths of prompt."""
        tokens = _CHUNKS * self._chunk
        whole = layer.whole - _CHUNKS * layers.each_layer(self._chunk)
        brief = layer.brief - layers.each_layer(self._brief)
        pairs, brief_pairs = tokens * (tokens + 1) // 2, self._brief * (self._brief + 1) // 2
        times = tokens / self._brief
        pair = max(whole - times * brief, _LEAST) / (pairs - times * brief_pairs)
        return pair, max(brief - pair * brief_pairs, 0.0) / self._brief

    def fixed(self, alone: Mapping[str, Fixed], layer_s: float, crowding: float) -> dict[str, Fixed]:
        """What attention of a layer takes whatever the sizes under each schedule, on two ranks that share the machine.

        `alone` has the same of schedules by themselves: it tells them apart, and the engine's steps say what is on top
        of all of them. With both ranks computing, everything else takes `crowding` times as long.
        """
        ones: list[float] = []
        boths: list[float] = []
        for schedule, own in alone.items():
            kernels = self._kernels(1)
            with self._engine(self._layers.deep, None, self._executor, 2, schedule) as engine:
                one, both = self._beside(engine, 1, kernels), self._beside(engine, 2, crowding * kernels)
            ones.append(one - layer_s - self._context_s - own.one)
            boths.append(both - crowding * layer_s - 2 * self._context_s - own.all)
        more_one, more_both = max(median(ones), 0.0), max(median(boths), 0.0)
        return {schedule: Fixed(own.one + more_one, own.all + more_both) for schedule, own in alone.items()}

    def _kernels(self, rows: int) -> float:
        """Seconds of a step's layers and logits, by themselves: no engine may be there, see `Bench`."""
        return self._layers.each_layer(rows) * self._layers.deep + self._layers.logits(rows)

    def _beside(self, engine: Engine, requests: int, kernels: float) -> float:
        """Seconds a layer of decode steps beside their kernels."""
        what = f"steps of {requests} requests, {engine.setup.config.scheduler.schedule}"
        self._bench.report(what)
        step = self._bench.agreed(what, *(decode_step(engine, requests, self._short, _STEPS) for _ in range(2)))
        return (step - self._step_s - kernels) / self._layers.deep

    def _thin_steps(self, depth: int) -> _Steps:
        """Of a thin engine, one at a time: see `Bench`."""
        self._bench.report(f"steps of {depth} thin layers")
        with self._engine(depth, _WIDTH) as engine:
            short, long = (
                self._bench.agreed(f"steps after {n} tokens", *(decode_step(engine, 1, n, _STEPS) for _ in range(2)))
                for n in (self._short, self._long)
            )
            brief, whole = (
                typical([_prompt(engine, tokens) for _ in range(_PROMPTS)])
                for tokens in (self._brief, _CHUNKS * self._chunk)
            )
        return _Steps(short, long, brief, whole)

    @contextmanager
    def _engine(
        self, depth: int, width: int | None, executor: str = "threads", ranks: int = 1, schedule: str = "auto"
    ) -> Iterator[Engine]:
        with plain_folder(self._values, depth, width) as folder:
            config = EngineConfig(
                folder, executor=executor, parallel=ParallelConfig(1, ranks, 1),
                cache=CacheConfig(memory_bytes=_CACHE_BYTES, enable_prefix_caching=False),
                scheduler=SchedulerConfig(
                    max_num_batched_tokens=self._chunk, max_num_seqs=2 * _MANY, schedule=schedule,
                    local_context=0,  # all spread
                ),
            )  # fmt: skip
            with Engine(config) as engine:
                yield engine


def decode_step(engine: Engine, requests: int, context: int, steps: int) -> float:
    """Seconds of a step in which so many requests decode, each after a prompt of `context` tokens."""
    params = SamplingParams(temperature=0, max_tokens=steps + requests + 1, ignore_eos=True)
    for number in range(requests):
        engine.add_request(str(number), [1 + number] * context, params)
    begun: set[str] = set()
    while len(begun) < requests:
        begun |= {output.request_id for output in engine.step()}
    step = typical(repeated(engine.step, steps))
    while engine.has_unfinished:
        engine.step()
    return step


def _prompt(engine: Engine, tokens: int) -> float:
    """Seconds of all steps of a prompt."""
    engine.add_request("prompt", [1] * tokens, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    total = 0.0
    while engine.has_unfinished:
        total += seconds(engine.step)
    return total


def plain(values: Mapping[str, Any], layers: int, width: int | None) -> dict[str, Any]:
    """A config.json of plain layers with the heads and the vocabulary of another, as wide as that or narrower."""
    heads = values["num_attention_heads"]
    found = {
        "head_dim": values["hidden_size"] // heads, **values, "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers, "attention_bias": False,
    }  # fmt: skip
    found.pop("quantization_config", None)
    return found if width is None else {**found, "hidden_size": width, "intermediate_size": width}


@contextmanager
def plain_folder(values: Mapping[str, Any], layers: int, width: int | None) -> Iterator[str]:
    """A folder with such a model."""
    config = plain(values, layers, width)
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        family, model = find_family(config)
        tensors = {param.name: torch.randn(param.shape) / math.sqrt(param.shape[-1]) for param in family.params(model)}
        save_file(tensors, Path(folder, "model.safetensors"))
        yield folder
