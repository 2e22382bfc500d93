"""What fits into the memory of a rank, and what attention moves: bytes of a model under a layout.

It owns these sums, for the engine and for the planner; it must not allocate anything, nor know how long anything takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Protocol

import torch

from longspan.attention.workload import AttentionShape, ExpansionCost
from longspan.cache.layout import KVLayout
from longspan.config import ParallelConfig
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig, MoEConfig
from longspan.models.context import LayerContext, Loader
from longspan.models.decoder import DecoderModel, Embedding, build_attention
from longspan.models.experts import routed_expert, shared_expert
from longspan.models.mlp import GatedMLP
from longspan.models.moe import ExpertRouter
from longspan.models.params import Extent, Param
from longspan.models.registry import BuildModel
from longspan.models.shapes import asked_by
from longspan.parallel.grid import Grid, split_evenly
from longspan.parallel.sharding import Sharding, check_heads, check_layers, max_kv_heads, max_layers
from longspan.weights.formats import WeightFormat

WORKSPACE_TOKENS = 16384  # tokens of other shards that a rank may hold at once
_USABLE = 0.99  # of a device's memory; the rest is the driver's
_RUNTIME_BYTES, _PEER_BYTES = 500_000_000, 300_000_000  # kernels and graphs; buffers of collectives for each peer
_HIDDEN_COPIES, _LOGIT_COPIES = 6, 3  # of hidden states, of fp32 logits, alive at the peak of a step


class HasMemory(Protocol):
    """A device, as far as it matters here."""

    @property
    def memory_bytes(self) -> float:
        """Bytes of its memory."""


@dataclass(frozen=True)
class WeightPart:
    """Weights a rank holds of one part of a layer: elements, bytes an element, and the products they take part in."""

    elements: float = 0.0
    element_bytes: float = 2.0
    products: int = 0

    @property
    def bytes(self) -> float:
        """Bytes on the rank."""
        return self.elements * self.element_bytes


@dataclass(frozen=True)
class RankMemory:
    """A model on devices in a layout. Raises `ConfigError` where the layout is impossible for the model.

    `memory_fraction` of a device's memory is used in all. `max_num_batched_tokens` and `max_num_seqs` bound a step and
    so the workspace; `travelling_tokens` of other shards' keys are held at once. `build` is that of the model's family.
    """

    model: ModelConfig
    hardware: HasMemory
    parallel: ParallelConfig
    weights: WeightFormat
    kv_element_bytes: int
    page_size: int = 16
    memory_fraction: float = 0.9
    gpus_per_node: int = 8
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    travelling_tokens: int = WORKSPACE_TOKENS
    build: BuildModel = DecoderModel

    def __post_init__(self) -> None:
        check_heads(self.grid, self.model.num_q_heads)
        check_layers(self.grid, self.model.num_layers)

    @cached_property
    def grid(self) -> Grid:
        """The ranks, in machines of `gpus_per_node`."""
        return Grid(replace(self.parallel, ranks_per_node=self.gpus_per_node))

    @cached_property
    def layout(self) -> KVLayout:
        """A token's cache row on the rank that holds the most."""
        return cache_layout(self.grid, self.model, self.kv_element_bytes, quantised=self.kv_element_bytes == 1)

    @cached_property
    def attention(self) -> WeightPart:
        """A layer's projections on one rank; q, k and v are one product."""
        products = asked_by(lambda context: build_attention(self.model, 0, "", context)).matrices
        return WeightPart(self._held(chain(*products)), self.weights.attention, len(products))

    @cached_property
    def ffn(self) -> WeightPart:
        """A dense layer's MLP on one rank; gate and up are one product."""
        return self._part(lambda context: GatedMLP(self.model, "", context), self.weights.ffn)

    @cached_property
    def shared(self) -> WeightPart:
        """A mixture's shared expert on one rank."""
        moe = self.model.moe
        return (
            self._of_mixture(shared_expert, self.weights.ffn) if moe and moe.shared_intermediate_size else WeightPart()
        )

    @cached_property
    def router(self) -> WeightPart:
        """A mixture's router, whole on every rank."""
        return self._of_mixture(ExpertRouter, self.weights.embedding)

    @cached_property
    def expert(self) -> WeightPart:
        """One routed expert, whole."""
        return self._of_mixture(partial(routed_expert, expert=0), self.weights.experts)

    @cached_property
    def experts_held(self) -> int:
        """Routed experts of a layer on the rank that holds the most."""
        moe = self.model.moe
        return -(-moe.num_experts // self.expert_holders) if moe else 0

    @cached_property
    def expert_holders(self) -> int:
        """Ranks the experts of a layer are split over."""
        return len(self.grid.expert_holders(0))

    @cached_property
    def head(self) -> WeightPart:
        """The logits' product on one rank."""
        return self._part(lambda context: Embedding(self.model, context), self.weights.embedding)

    @property
    def moe_layers(self) -> int:
        """Layers with a mixture."""
        return len(self.model.moe.layers) if self.model.moe else 0

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights on the rank that holds the most."""
        if self.build is not DecoderModel:
            return max(map(self._bytes_as_built, range(self.grid.world_size)))
        mixed = self.model.moe.layers if self.model.moe else frozenset()
        experts = self.shared.bytes + self.router.bytes + self.expert.bytes * self.experts_held
        each = [
            self.attention.bytes + (experts if n in mixed else self.ffn.bytes) for n in range(self.model.num_layers)
        ]
        stages = [sum(each[slice(*split_evenly(len(each), self.grid.pp, n))]) for n in range(self.grid.pp)]
        stages[0] += self.head.bytes
        if not self.model.tie_word_embeddings or len(stages) != 1:
            stages[-1] += self.head.bytes
        return max(stages)

    @property
    def workspace_bytes(self) -> float:
        """Bytes a step takes at its peak beside weights and cache: runtime, peers' buffers, activations, logits."""
        model, rows, activation = self.model, self.max_num_batched_tokens, self.weights.embedding
        wide = self._mixture_row(model.moe) if model.moe else 3 * model.intermediate_size / self.grid.tp
        tokens = rows * activation * (_HIDDEN_COPIES * model.hidden_size + wide)
        logits = _LOGIT_COPIES * self.max_num_seqs * model.vocab_size * 4
        return _RUNTIME_BYTES + _PEER_BYTES * (self.grid.world_size - 1) + tokens + logits

    def _mixture_row(self, moe: MoEConfig) -> float:
        """Elements a token takes in a mixture: its copies for the experts it chose, their results, and inside."""
        inside = 3 * moe.intermediate_size / self.expert_holders
        return moe.experts_per_token * (2 * self.model.hidden_size + inside)

    @property
    def cache_bytes(self) -> float:
        """Bytes left for the cache of a rank; negative where the rest does not fit."""
        usable = self.hardware.memory_bytes * _USABLE * self.memory_fraction
        return usable - self.weight_bytes - self.workspace_bytes

    @property
    def pages_per_shard(self) -> tuple[int, ...]:
        """Pages of every shard; zeros where nothing fits."""
        return (max(0, self.layout.pages_in(int(self.cache_bytes), self.page_size)),) * self.grid.num_shards

    @property
    def capacity_tokens(self) -> int:
        """Tokens the cache holds."""
        return sum(self.pages_per_shard) * self.page_size

    def missing_bytes(self, tokens: int) -> float:
        """Bytes that a rank lacks for one request of `tokens`; not positive where it has room."""
        pages = math.ceil(tokens / self.page_size / self.grid.num_shards)
        return pages * self.page_size * self.layout.bytes_per_token - self.cache_bytes

    def check_fits(self, tokens: int) -> None:
        """Raise `ConfigError` with the missing GB of a rank unless a request of `tokens` fits."""
        missing = self.missing_bytes(tokens)
        if missing > 0:
            raise ConfigError(
                "layout", self.parallel.name,
                f"a rank lacks {missing / 1e9:,.1f} GB for {tokens:,} tokens "
                f"(weights {self.weight_bytes / 1e9:,.1f} GB, workspace {self.workspace_bytes / 1e9:,.1f} GB)",
                "use more ranks, a smaller weight or cache format, or a shorter context",
            )  # fmt: skip

    def _part(self, build: Callable[[LayerContext], object], element_bytes: float) -> WeightPart:
        asked = asked_by(build)
        return WeightPart(self._held(asked.params), element_bytes, len(asked.matrices))

    def _of_mixture(self, build: Callable[[MoEConfig, int, str, Loader], object], element_bytes: float) -> WeightPart:
        """Of a mixture; nothing where the model has none."""
        moe, hidden = self.model.moe, self.model.hidden_size
        if moe is None:
            return WeightPart()
        return self._part(lambda context: build(moe, hidden, "", context.loader), element_bytes)

    def _held(self, params: Iterable[Param]) -> int:
        """Elements on the rank that holds the most of them."""
        found = list(params)
        return max(_elements(found, self._extent(rank)) for rank in self.grid.tp_group(0))

    def _bytes_as_built(self, rank: int) -> float:
        """Bytes of a family that builds its own layers, all of its weights in the dtype of activations."""
        extent = self._extent(rank)
        asked = asked_by(lambda context: self.build(self.model, context, torch.float32), extent)
        return _elements(set(asked.params), extent) * self.weights.embedding

    def _extent(self, rank: int) -> Extent:
        return Sharding(self.grid, rank, self.model.num_q_heads, self.model.num_kv_heads).extent


def _elements(params: Iterable[Param], extent: Extent) -> int:
    """Elements of parameters where such parts of the logical axes are held."""
    return sum(math.prod(stop - start for start, stop in param.bounds(extent)) for param in params)


def cache_layout(grid: Grid, model: ModelConfig, element_bytes: int, quantised: bool = False) -> KVLayout:
    """What a token costs on the rank that holds the most KV heads and layers; all ranks have as many pages."""
    kv_heads = max_kv_heads(grid, model.num_q_heads, model.num_kv_heads)
    groups = (model.mla.kv_lora_rank, model.mla.rope_dim) if model.mla else (model.head_dim,)
    return KVLayout(
        max_layers(grid, model.num_layers), kv_heads, model.head_dim, element_bytes, model.kv_factor,
        groups if quantised else (),
    )  # fmt: skip


def attention_shape(grid: Grid, model: ModelConfig, layout: KVLayout, element_bytes: int) -> AttentionShape:
    """What attention's cost and bytes depend on, on one rank; `element_bytes` are those of activations."""
    mla, expansion = model.mla, ExpansionCost()
    if mla:
        expansion = ExpansionCost.of(mla.kv_lora_rank, mla.rope_dim, mla.query_dim, mla.value_dim)
    start, stop = Sharding(grid, 0, model.num_q_heads, model.num_kv_heads).q_extent  # all ranks have as many
    return AttentionShape(
        q_heads=stop - start,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        element_bytes=element_bytes,
        kv_factor=layout.kv_factor,
        value_dim=model.cached_value_dim,
        expansion=expansion,
        row_bytes=layout.row_bytes,
    )
