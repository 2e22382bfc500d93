"""Measures attention and the host in steps of real engines.

Models with narrow layers are used, in which attention takes most of the time; the difference between two depths is the
time of the additional layers. This module owns these models and the steps that are timed; it must not know how times
are predicted from the results.
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

_WIDTH = 64  # hidden size of a narrow model
_DEPTHS = (1, 9)  # layers of the two narrow models
_SHORT, _LONG = 448, 4096  # tokens of context of a decode step
_CHUNK, _CHUNKS = 2048, 2  # long prompt: new tokens of a step, and steps
_BRIEF = 512  # tokens of the short prompt
_STEPS = 24  # timed decode steps
_PROMPTS = 3  # timed prompts
_MANY = 8  # requests of a large decoding batch
_MIN = 1e-12  # smallest constant in seconds: differences of noisy times may be negative
_CACHE_BYTES = 1 << 28  # KV cache of a rank


@dataclass(frozen=True)
class EngineTimes:
    """Constants measured in steps of an engine, in seconds."""

    step_s: float  # the host, for a step
    layer_s: float  # a layer, besides its kernels
    call_s: float  # an attention call
    read_s: float  # a byte of keys and values that attention reads
    flop_s: float  # a floating-point operation of attention
    row_s: float  # a row of attention, besides its operations


@dataclass(frozen=True)
class _Steps:
    """Seconds of the steps of one narrow engine."""

    short: float  # a decode step after a short context
    long: float  # a decode step after a long context
    brief: float  # all steps of a short prompt
    whole: float  # all steps of a long prompt

    def per_layer(self, deeper: _Steps) -> _Steps:
        """The times of one layer, from the difference to an engine with more layers."""
        layers = _DEPTHS[1] - _DEPTHS[0]
        both = zip(astuple(self), astuple(deeper), strict=True)
        return _Steps(*((more - less) / layers for less, more in both))


class EngineBench:
    """Engines with random weights: narrow ones, and one as wide as the given model."""

    def __init__(self, bench: Bench, values: Mapping[str, Any], executor: str, layers: LayerBench) -> None:
        self._bench, self._values, self._executor, self._layers = bench, values, executor, layers
        self._narrow = load_config(plain(values, 1, _WIDTH))
        self._long = min(_LONG, self._narrow.max_position_embeddings - 2 * _STEPS)
        self._short = min(_SHORT, self._long // 2)
        self._chunk = min(_CHUNK, self._long // _CHUNKS)
        self._brief = min(_BRIEF, self._chunk // 2)
        self._step_s = self._context_s = 0.0

    def measure(self) -> EngineTimes:
        """Constants of one rank that has the machine to itself."""
        row_bytes = 2 * self._narrow.num_kv_heads * self._narrow.head_dim * self._bench.dtype.itemsize
        layers = LayerBench(self._bench, self._narrow)
        shallow, deep = map(self._narrow_steps, _DEPTHS)
        layer = shallow.per_layer(deep)
        read = max(layer.long - layer.short, _MIN) / ((self._long - self._short) * row_bytes)
        self._step_s = max(shallow.short - layer.short - layers.logits(1), 0.0)
        self._context_s = self._short * row_bytes * read
        pair, row = self._prompt_rates(layer, layers)
        kernels = [self._kernels(rows) for rows in (1, _MANY)]
        with self._engine(self._layers.deep, None) as wide:
            one, many = (self._besides(wide, n, own) for n, own in zip((1, _MANY), kernels, strict=True))
        call = max((many - one) / (_MANY - 1) - self._context_s, _MIN)
        return EngineTimes(
            step_s=self._step_s,
            layer_s=max(one - call - self._context_s, 0.0),
            call_s=call,
            read_s=read,
            flop_s=pair / (4 * self._narrow.num_q_heads * self._narrow.head_dim),
            row_s=row,
        )

    def _prompt_rates(self, layer: _Steps, layers: LayerBench) -> tuple[float, float]:
        """Fit the time of prompts of two lengths: a constant for each query-key pair, and one for each query row.

        Returns (seconds per pair, seconds per row).
        """
        tokens = _CHUNKS * self._chunk
        whole = layer.whole - _CHUNKS * layers.each_layer(self._chunk)
        brief = layer.brief - layers.each_layer(self._brief)
        pairs, brief_pairs = tokens * (tokens + 1) // 2, self._brief * (self._brief + 1) // 2
        times = tokens / self._brief
        pair = max(whole - times * brief, _MIN) / (pairs - times * brief_pairs)
        return pair, max(brief - pair * brief_pairs, 0.0) / self._brief

    def fixed(self, alone: Mapping[str, Fixed], layer_s: float, slowdown: float) -> dict[str, Fixed]:
        """The time of attention in a layer that does not depend on sizes, for each schedule, on two ranks.

        `alone` has these times as measured outside an engine. The median difference to the engine's steps is added to
        all of them: one schedule's own difference is too noisy. When both ranks compute, everything outside attention
        takes `slowdown` times as long.
        """
        ones: list[float] = []
        boths: list[float] = []
        for schedule, own in alone.items():
            kernels = self._kernels(1)
            with self._engine(self._layers.deep, None, self._executor, 2, schedule) as engine:
                one, both = self._besides(engine, 1, kernels), self._besides(engine, 2, slowdown * kernels)
            ones.append(one - layer_s - self._context_s - own.one)
            boths.append(both - slowdown * layer_s - 2 * self._context_s - own.all)
        more_one, more_both = max(median(ones), 0.0), max(median(boths), 0.0)
        return {schedule: Fixed(own.one + more_one, own.all + more_both) for schedule, own in alone.items()}

    def _kernels(self, rows: int) -> float:
        """Seconds of a step's layers and logits outside an engine. No engine may exist then: `Bench` says why."""
        return self._layers.each_layer(rows) * self._layers.deep + self._layers.logits(rows)

    def _besides(self, engine: Engine, requests: int, kernels: float) -> float:
        """Seconds of a layer in a decode step, besides the host's time for the step and `kernels`."""
        what = f"steps of {requests} requests, {engine.setup.config.scheduler.schedule}"
        self._bench.report(what)
        step = self._bench.agreed(what, *(decode_step(engine, requests, self._short, _STEPS) for _ in range(2)))
        return (step - self._step_s - kernels) / self._layers.deep

    def _narrow_steps(self, depth: int) -> _Steps:
        """The times of a narrow engine of `depth` layers. Only one engine exists at a time: `Bench` says why."""
        self._bench.report(f"steps of {depth} narrow layers")
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
        """An engine with random weights of `depth` layers, as wide as the model (None) or of a hidden size."""
        with plain_folder(self._values, depth, width) as folder:
            config = EngineConfig(
                folder, executor=executor, parallel=ParallelConfig(1, ranks, 1),
                cache=CacheConfig(memory_bytes=_CACHE_BYTES, enable_prefix_caching=False),
                scheduler=SchedulerConfig(
                    max_num_batched_tokens=self._chunk, max_num_seqs=2 * _MANY, schedule=schedule,
                    local_context=0,  # spread every context
                ),
            )  # fmt: skip
            with Engine(config) as engine:
                yield engine


def decode_step(engine: Engine, requests: int, context: int, steps: int) -> float:
    """Seconds of a step in which `requests` requests decode, each after a prompt of `context` tokens."""
    params = SamplingParams(temperature=0, max_tokens=steps + requests + 1, ignore_eos=True)
    for number in range(requests):
        engine.add_request(str(number), [1 + number] * context, params)
    decoding: set[str] = set()
    while len(decoding) < requests:
        decoding |= {output.request_id for output in engine.step()}
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
    """A config.json of Llama layers with the heads and vocabulary of `values`, and hidden size `width` if given."""
    heads = values["num_attention_heads"]
    found = {
        "head_dim": values["hidden_size"] // heads, **values, "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers, "attention_bias": False,
    }  # fmt: skip
    found.pop("quantization_config", None)
    return found if width is None else {**found, "hidden_size": width, "intermediate_size": width}


@contextmanager
def plain_folder(values: Mapping[str, Any], layers: int, width: int | None) -> Iterator[str]:
    """A folder with the model that `plain` describes and random weights."""
    config = plain(values, layers, width)
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        family, model = find_family(config)
        tensors = {param.name: torch.randn(param.shape) / math.sqrt(param.shape[-1]) for param in family.params(model)}
        save_file(tensors, Path(folder, "model.safetensors"))
        yield folder
