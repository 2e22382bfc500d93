"""This machine's constants, measured with the engine's own kernels and executors.

It owns what is run and timed and how that becomes a `Hardware`; it must not know how times are predicted from it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.calibrate import combine
from longspan.attention.cost import CostConstants
from longspan.attention.rows import CacheRows
from longspan.bench.ranks import run_on_ranks
from longspan.cache.pages import Span
from longspan.config import CacheConfig, EngineConfig, ParallelConfig
from longspan.engine.engine import Engine
from longspan.engine.setup import resolve
from longspan.engine.worker import measure_cost
from longspan.hardware import Hardware
from longspan.models.config import ModelConfig
from longspan.models.decoder import decoder_params
from longspan.models.layers import DenseLinear, RMSNorm, table_product
from longspan.models.registry import load_config
from longspan.models.rope import Rotary, apply_rope
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.planner.models import find_config
from longspan.reach import QueryRun
from longspan.request import SamplingParams

DEFAULT_MODEL = "smollm2-135m"
_FEW_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MANY_ROWS = (128, 256, 512, 1024, 2048)
_PASSED_ROWS = 512
_CHUNK = 2048  # new tokens of a prompt in a step
_STREAM_BYTES = 1 << 28  # more than caches hold
_MOST_LAYERS_BYTES = 1 << 30
_REPEATS = 5
_KERNELS_A_LAYER = 10  # as the planner counts: six small ones, and four products whose own time is in the table
_PROBE_WIDTH = 64
_PROBE_STEPS = 48
_AGREE = 0.1
_DEFAULT_LINK_GB_S = 25.0  # of a GPU whose links are not measured

Report = Callable[[str], None]


@dataclass(frozen=True)
class Calibrated:
    """The machine, and which of two timings of the same thing differed too much, with the difference."""

    machine: Hardware
    notes: tuple[str, ...]


class _Bench:
    """Times things twice on one device; what does not agree is noted."""

    def __init__(self, device: torch.device, report: Report) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.notes: list[str] = []
        self.report = report

    def seconds(self, what: str, *runs: Callable[[], object], repeats: int = _REPEATS) -> float:
        """All runs in turn, the least of each: what else runs here can only make it longer. Two halves should agree."""
        for run in runs:
            run()
        return self.agreed(what, *(self._least(runs, repeats) for _ in range(2)))

    def agreed(self, what: str, first: float, second: float) -> float:
        """The lower of two, and a note if they are far apart."""
        low, high = min(first, second), max(first, second)
        if high > (1 + _AGREE) * low > 0:
            self.notes.append(f"{what}: two timings differ by {high / low - 1:.0%}; is the machine idle?")
        return low

    def tensor(self, *shape: int) -> Tensor:
        """Random numbers."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def _least(self, runs: Sequence[Callable[[], object]], repeats: int) -> float:
        least = [math.inf] * len(runs)
        for _ in range(repeats):  # all in turn, so that none finds its weights in a cache
            for number, run in enumerate(runs):
                least[number] = min(least[number], self._once(run))
        return sum(least)

    def _once(self, run: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def calibrate(model: str, executor: str, report: Report) -> Calibrated:
    """Measure this machine with the shapes of a model (folder, hub id or built-in name); `report` hears what is on.

    Takes less than a minute. Raises `ModelError`.
    """
    values = find_config(model)
    shape = load_config(values)
    gpu = torch.cuda.is_available()
    bench = _Bench(torch.device("cuda" if gpu else "cpu"), report)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    report("memory")
    stream = _stream(bench)
    table = _products(bench, shape)
    report("norms and activations")
    read, kernel = _passes(bench, shape)
    with _probe(values) as folder:
        report("attention")
        cost = _attention(bench, shape, folder, executor)
        report("the engine's own time")
        step = _step(bench, folder, executor, shape.vocab_size)
    link = _DEFAULT_LINK_GB_S if gpu else min(1e-9 / max(cost.byte_s, 1e-15), 1e-12 / stream * 1e3)
    machine = Hardware(
        tflops=max(2 * rows / seconds for rows, seconds in table) / 1e12,
        memory_gb=_memory_bytes(bench.device) / (1 << 30),
        memory_tb_s=1e-12 / stream,
        intra_gb_s=link,
        inter_gb_s=link,
        matmul=1.0,
        attention=1.0,
        memory=stream / read,
        intra_link=1.0,
        inter_link=1.0,
        kernel_s=kernel,
        message_s=cost.message_s,
        cross_message_s=cost.cross_message_s,
        step_s=step,
        tile_rows=1,
        parallelism=0.0 if gpu else 1.0,
        calls_per_segment=not gpu,
        product_s=table,
        attention_cost=cost,
    )
    return Calibrated(machine, tuple(bench.notes))


def _stream(bench: _Bench) -> float:
    """Seconds a byte that is read once."""
    big = torch.ones(_STREAM_BYTES // bench.dtype.itemsize, dtype=bench.dtype, device=bench.device)
    return bench.seconds("memory", big.sum) / _STREAM_BYTES


def _products(bench: _Bench, shape: ModelConfig) -> tuple[tuple[int, float], ...]:
    """Seconds a weight element, by rows.

    Few rows go through more layers than caches hold, and through the head: a decoding batch does. Many rows are bound
    by arithmetic, so two layers do.
    """
    q, kv = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, wide = shape.hidden_size, shape.intermediate_size
    sizes = ((q + 2 * kv, hidden), (hidden, q), (2 * wide, hidden), (hidden, wide))
    each = sum(out * into for out, into in sizes)
    layers = max(2, min(shape.num_layers, _MOST_LAYERS_BYTES // (each * bench.dtype.itemsize)))
    weights = [[DenseLinear(bench.tensor(*size)) for size in sizes] for _ in range(layers)]
    head = bench.tensor(shape.vocab_size, hidden)
    found: list[tuple[int, float]] = []
    for rows in (*_FEW_ROWS, *_MANY_ROWS):
        bench.report(f"products of {rows} rows")
        inputs = [bench.tensor(rows, into) for _, into in sizes]
        few = rows <= _FEW_ROWS[-1]
        runs: list[Callable[[], object]] = [partial(_layer, layer, inputs) for layer in weights[: None if few else 2]]
        elements = len(runs) * each
        if few:
            runs.append(partial(table_product, bench.tensor(rows, hidden), head))
            elements += shape.vocab_size * hidden
        found.append((rows, bench.seconds(f"products of {rows} rows", *runs, repeats=4) / elements))
    return tuple(found)


def _layer(linears: Sequence[DenseLinear], inputs: Sequence[Tensor]) -> None:
    for linear, x in zip(linears, inputs, strict=True):
        linear(x)


def _passes(bench: _Bench, shape: ModelConfig) -> tuple[float, float]:
    """(seconds a byte of what is small beside products, seconds a kernel), as the planner counts both."""
    eps, heads = shape.rms_norm_eps, shape.num_q_heads + shape.num_kv_heads
    norm = RMSNorm(bench.tensor(shape.hidden_size), eps)
    rotary = Rotary(shape.rope, shape.rotary_dim, bench.dtype, bench.device)

    def small(rows: int) -> float:
        x, y = bench.tensor(rows, shape.hidden_size), bench.tensor(rows, heads, shape.head_dim)
        both = bench.tensor(rows, 2 * shape.intermediate_size)
        cos, sin = rotary.table(torch.arange(rows, device=bench.device))

        def run() -> None:
            for _ in range(2):
                norm(x)
                x + x
            if shape.rotary_dim == shape.head_dim:
                apply_rope(y, cos, sin)
            gate, up = both.chunk(2, dim=-1)
            F.silu(gate).mul_(up)

        return bench.seconds(f"norms and activations of {rows} rows", run, repeats=4 * _REPEATS)

    inner = shape.num_q_heads * shape.head_dim + shape.intermediate_size
    size = _PASSED_ROWS * (8 * shape.hidden_size + 4 * inner) * bench.dtype.itemsize
    least = small(1)
    return max(small(_PASSED_ROWS) - least, least) / size, least / _KERNELS_A_LAYER


@dataclass(frozen=True)
class _Measure:
    """What every rank runs to measure attention and exchange."""

    config: EngineConfig

    def __call__(self, rank: int, make_group: Any, traffic: object) -> CostConstants:
        setup = resolve(self.config)
        return measure_cost(setup, rank, make_group(setup.grid.context_group(rank)), setup.device())


def _attention(bench: _Bench, shape: ModelConfig, folder: str, executor: str) -> CostConstants:
    """Of one rank that has the machine; of exchange, of two that share it, unless there is but one device."""
    one = _cost(bench, folder, "threads", 1)
    if bench.device.type == "cuda":
        return one
    if shape.mla is None:
        one = replace(one, flop_s=_prompt_flop(bench, shape))
    two = _cost(bench, folder, executor, 2)
    return replace(
        one, message_s=two.message_s, byte_s=two.byte_s, cross_message_s=two.cross_message_s,
        cross_byte_s=two.cross_byte_s, hidden=two.hidden, fixed=two.fixed, parallelism=1.0,
    )  # fmt: skip


def _prompt_flop(bench: _Bench, shape: ModelConfig) -> float:
    """Seconds an operation where a prompt's chunk meets itself and what came before it."""
    backend, scale = CpuBackend(), shape.attention_scale
    blocks = Sharding(Grid(ParallelConfig()), 0, shape.num_q_heads, shape.num_kv_heads).own_blocks
    q = bench.tensor(_CHUNK, shape.num_q_heads, shape.head_dim)
    own = bench.tensor(_CHUNK, shape.num_kv_heads, shape.head_dim)
    before = CacheRows(bench.tensor(2, shape.num_kv_heads, 2 * _CHUNK, shape.head_dim))
    run = [QueryRun(0, _CHUNK, (Span(0, 2 * _CHUNK),))]
    diagonal = bench.seconds("attention within a chunk", lambda: backend.causal(q, own, own, blocks, scale))
    rest = bench.seconds("attention to a context", lambda: backend.attend(q, run, before, blocks, scale))
    pairs = _CHUNK * (_CHUNK + 1) // 2 + 2 * _CHUNK * _CHUNK
    return (diagonal + rest) / (4 * pairs * shape.num_q_heads * shape.head_dim)


def _cost(bench: _Bench, folder: str, executor: str, ranks: int) -> CostConstants:
    config = EngineConfig(folder, parallel=ParallelConfig(1, ranks, 1), cache=CacheConfig(pages_per_shard=(4,) * ranks))
    first, second = (combine(run_on_ranks(executor, ranks, _Measure(config))) for _ in range(2))
    where = f"with {ranks} {executor}"
    return replace(
        min(first, second, key=lambda cost: cost.call_s),
        call_s=bench.agreed(f"an attention call {where}", first.call_s, second.call_s),
        flop_s=bench.agreed(f"attention {where}", first.flop_s, second.flop_s),
        read_s=bench.agreed(f"reading keys {where}", first.read_s, second.read_s),
        message_s=bench.agreed(f"a message {where}", first.message_s, second.message_s),
    )


def _step(bench: _Bench, folder: str, executor: str, vocabulary: int) -> float:
    """Seconds a decode step of a model that is little but its vocabulary takes beside its logits: the host's own."""
    config = EngineConfig(folder, executor=executor, cache=CacheConfig(pages_per_shard=(64,)))
    params = SamplingParams(temperature=0, max_tokens=_PROBE_STEPS, ignore_eos=True)
    with Engine(config) as engine:
        first, second = (min(_steps(engine, f"probe-{run}", params)) for run in range(2))
    step = bench.agreed("a step of the engine", first, second)
    x, head = bench.tensor(1, _PROBE_WIDTH), bench.tensor(vocabulary, _PROBE_WIDTH)
    return max(step - bench.seconds("logits", lambda: table_product(x, head)), 0.0)


def _steps(engine: Engine, request: str, params: SamplingParams) -> list[float]:
    """Seconds of each decode step of one request."""
    engine.add_request(request, [1, 2, 3], params)
    engine.step()
    seconds: list[float] = []
    while engine.has_unfinished:
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def _probe(values: Mapping[str, Any]) -> Iterator[str]:
    """A folder with a model of one thin layer with the heads and the vocabulary of another."""
    heads = values["num_attention_heads"]
    thin = {
        "head_dim": values["hidden_size"] // heads, **values, "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1, "hidden_size": _PROBE_WIDTH, "intermediate_size": _PROBE_WIDTH, "attention_bias": False,
    }  # fmt: skip
    thin.pop("quantization_config", None)
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        Path(folder, "config.json").write_text(json.dumps(thin))
        tensors = {param.name: torch.randn(param.shape) / 8 for param in decoder_params(load_config(thin))}
        save_file(tensors, Path(folder, "model.safetensors"))
        yield folder


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
