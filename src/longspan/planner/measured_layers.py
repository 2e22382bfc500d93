"""Measures a model's layers outside attention on this machine, by number of rows, as the engine runs them.

It owns the random weights that are used, and how a measured time is divided into products, passes over rows and kernel
launches; it must not know attention or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from longspan.attention.layer import AttentionLayer
from longspan.clock import Run
from longspan.models.config import ModelConfig
from longspan.models.context import LayerContext, Linear, LinearStack
from longspan.models.decoder import DecoderModel
from longspan.models.layers import dense_linear, table_product
from longspan.models.ops import choose_ops
from longspan.models.params import Extent, Param
from longspan.models.shapes import requests_of
from longspan.planner.linear import passed_elements
from longspan.planner.timing import Bench

_FEW_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # measured with many layers and the head
_MANY_ROWS = (128, 256, 512, 1024, 2048)  # measured with few layers
_PASSED_ROWS = 512  # rows at which the passes over rows are measured
_SHARED_ROWS = (1, 4, 16, 64, 512)  # rows of passes on all cores at once
_MAX_LAYER_BYTES = 1 << 30  # weights of the measured layers
_FEW_LAYERS = 2  # enough for many rows, which are bound by arithmetic
KERNELS_PER_LAYER = 10  # as the planner counts: six small ones, and four products, whose own time is in the table
_MIN_SHARE = 0.05  # least part of a layer's time that is taken to be that of its products


@dataclass(frozen=True)
class LayerTimes:
    """Constants of a layer outside attention, in seconds."""

    read_s: float  # a byte that norms and activations read or write
    kernel_s: float  # a kernel launch
    product_s: tuple[tuple[int, float], ...]  # (rows, seconds for each weight element)


class _RandomWeights:
    """A loader of random weights for a run of `layers` layers, neither the first nor the last of the model."""

    def __init__(self, bench: Bench, layers: int) -> None:
        self.device = bench.device
        self.extent = _inner(layers)
        self._bench = bench

    def load(self, *params: Param) -> Tensor:
        """A random weight of the parameters, concatenated by rows."""
        shape = (sum(param.shape[0] for param in params), *params[0].shape[1:])
        weight = self._bench.tensor(*shape) / math.sqrt(shape[-1])
        return weight.float() if any(param.exact for param in params) else weight

    def table(self, param: Param, is_multiplied: bool) -> Tensor:
        """Such a weight."""
        return self.load(param)

    def linear(self, *params: Param) -> Linear:
        """A product with such a weight."""
        return dense_linear(self.load(*params))

    def linear_stack(self, *entries: Sequence[Param]) -> LinearStack:
        """Products with such weights."""
        return LinearStack(tuple(self.linear(*entry) for entry in entries))


def _inner(layers: int) -> Extent:
    """The extent of layers 1 to `layers`, and of the whole of every other axis."""
    return lambda axis, size: (1, 1 + layers) if axis == "layers" else (0, size)


def _no_attention(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros [T, Hq, Dv] in place of attention."""
    return q.new_zeros(q.shape[0], q.shape[1], layer.latent.value_dim if layer.latent else v.shape[-1])


class LayerBench:
    """A model's layers and logits with random weights.

    Few rows are measured with more layers than the processor's caches hold, and with the head, as in a decode step.
    """

    def __init__(self, bench: Bench, shape: ModelConfig) -> None:
        self._bench, self._shape = bench, replace(shape, moe=None)
        self.sizes = _product_sizes(self._shape)
        self._each = sum(out * into for out, into in self.sizes)
        most = _MAX_LAYER_BYTES // (self._each * bench.dtype.itemsize)
        self.deep = max(_FEW_LAYERS, min(shape.num_layers, most))  # layers that few rows are measured with
        self._models = {count: self._model(count) for count in (self.deep, _FEW_LAYERS)}
        self._head = bench.tensor(shape.vocab_size, shape.hidden_size)

    def measure(self) -> LayerTimes:
        """Time layers and logits by number of rows, and divide the times into the constants.

        The products alone are timed at one row and at many: the rest of a layer's time depends on the hidden size, not
        on the size of the weights.
        """
        every = (*_FEW_ROWS, *_MANY_ROWS)
        runs = {f"layers of {rows} rows": self.layers(rows) for rows in every}
        runs |= {f"logits of {rows} rows": self._logits(rows) for rows in _FEW_ROWS}
        runs |= {f"products of {rows} rows": self._products(rows) for rows in (1, _PASSED_ROWS)}
        found = self._bench.rounds(runs)
        taken = {rows: found[f"layers of {rows} rows"] / self._count(rows) for rows in every}
        alone = {rows: found[f"products of {rows} rows"] / self._count(rows) for rows in (1, _PASSED_ROWS)}
        kernel = max((taken[1] - alone[1]) / KERNELS_PER_LAYER, 0.0)
        above = taken[_PASSED_ROWS] - alone[_PASSED_ROWS] - KERNELS_PER_LAYER * kernel
        passed = passed_elements(self._shape) * self._bench.dtype.itemsize
        read = max(above, _MIN_SHARE * taken[_PASSED_ROWS]) / (_PASSED_ROWS * passed)
        table: list[tuple[int, float]] = []
        for rows, seconds in taken.items():
            products = seconds - KERNELS_PER_LAYER * kernel - rows * passed * read
            products, elements = max(products, _MIN_SHARE * seconds) * self.deep, self.deep * self._each
            if rows in _FEW_ROWS:
                products, elements = products + found[f"logits of {rows} rows"], elements + self._head.numel()
            table.append((rows, products / elements))
        return LayerTimes(read, kernel, tuple(table))

    def sharing(self) -> tuple[tuple[int, float], ...]:
        """(rows, factor): how much longer a pass takes when each core computes its own than when all share one."""
        cores = self._bench.cores
        found: list[tuple[int, float]] = []
        for rows in _SHARED_ROWS:
            together = self._bench.seconds(f"layers of {rows} rows", self.layers(rows))
            with ThreadPoolExecutor(cores, initializer=partial(torch.set_num_threads, 1)) as pool:
                passes = partial(_at_once, pool, [self.layers(rows) for _ in range(cores)])
                apart = self._bench.seconds(f"layers of {rows} rows on each core", passes)
            found.append((rows, max(1.0, apart / together)))
        return tuple(found)

    def layers(self, rows: int) -> Run:
        """A function that runs `rows` rows through the layers."""
        model = self._models[self._count(rows)]
        x, positions = self._bench.tensor(rows, self._shape.hidden_size), torch.arange(rows, device=self._bench.device)
        return lambda: model.layers(x, positions, _no_attention)

    def each_layer(self, rows: int) -> float:
        """Seconds of one layer."""
        return self._bench.seconds(f"layers of {rows} rows", self.layers(rows)) / self._count(rows)

    def logits(self, rows: int) -> float:
        """Seconds of the logits of `rows` rows."""
        return self._bench.seconds(f"logits of {rows} rows", self._logits(rows))

    def _count(self, rows: int) -> int:
        """Number of layers that `rows` rows are measured with."""
        return self.deep if rows <= _FEW_ROWS[-1] else _FEW_LAYERS

    def _logits(self, rows: int) -> Run:
        return partial(table_product, self._bench.tensor(rows, self._shape.hidden_size), self._head)

    def _model(self, layers: int) -> DecoderModel:
        """A decoder of inner layers: without the embedding before the first layer and the head after the last."""
        context = LayerContext(_RandomWeights(self._bench, layers), ops=choose_ops(self._bench.device))
        return DecoderModel(replace(self._shape, num_layers=layers + 2), context, self._bench.dtype)

    def _products(self, rows: int) -> Run:
        """A function that computes the products of all layers, and nothing else."""
        layers = range(self._count(rows))
        weights = [[dense_linear(self._bench.tensor(*size)) for size in self.sizes] for _ in layers]
        inputs = [self._bench.tensor(rows, into) for _, into in self.sizes]

        def run() -> None:
            for layer in weights:
                for linear, x in zip(layer, inputs, strict=True):
                    linear(x)

        return run


def _at_once(pool: Executor, runs: Sequence[Run]) -> None:
    """Run all functions at once, each in a thread, and wait for them."""
    for done in [pool.submit(torch.inference_mode()(run)) for run in runs]:
        done.result()


def _product_sizes(shape: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of the weights of a dense layer's products."""
    model = replace(shape, num_layers=3)
    asked = requests_of(lambda context: DecoderModel(model, context, torch.float32), _inner(1))
    return [(sum(param.shape[0] for param in product), product[0].shape[1]) for product in asked.matrices]
