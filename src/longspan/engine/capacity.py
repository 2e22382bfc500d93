"""Bytes of weights, cache and workspace on one rank, and the sizes that attention's cost depends on.

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
from longspan.config import CacheConfig, ParallelConfig
from longspan.errors import ConfigError
from longspan.models.config import ModelConfig, MoEConfig
from longspan.models.context import LayerContext
from longspan.models.decoder import DecoderModel, Embedding, build_attention
from longspan.models.experts import routed_experts, shared_expert
from longspan.models.mlp import GatedMLP
from longspan.models.moe import ExpertRouter
from longspan.models.params import Extent, Param
from longspan.models.registry import BuildModel
from longspan.models.shapes import requests_of
from longspan.parallel.grid import Grid, split_evenly
from longspan.parallel.sharding import Sharding, check_heads, check_layers, max_kv_heads
from longspan.weights.formats import WeightFormat

WORKSPACE_TOKENS = 16384  # tokens of other shards whose KV a rank may hold at once
_USABLE = 0.99  # fraction of a device's memory; the CUDA driver takes the rest
_RUNTIME_BYTES, _PEER_BYTES = 500_000_000, 300_000_000  # kernels and graphs; buffers of collectives for each peer
_HIDDEN_COPIES, _LOGIT_COPIES = 6, 3  # copies of hidden states and of fp32 logits at the peak of a step


class HasMemory(Protocol):
    """A device with memory."""

    @property
    def memory_bytes(self) -> float:
        """Size of the device's memory."""


@dataclass(frozen=True)
class WeightPart:
    """The weights of one part of a layer that a rank holds."""

    # number of weights
    elements: float = 0.0
    # bytes of one weight
    element_bytes: float = 2.0
    # matrix products that they are used in
    products: int = 0

    @property
    def bytes(self) -> float:
        """Bytes on the rank."""
        return self.elements * self.element_bytes


@dataclass(frozen=True)
class DraftBytes:
    """The memory that a checkpoint of its own that drafts takes, on a rank of the last stage."""

    # bytes of its weights
    weights: float = 0.0
    # bytes of one cached token
    cached_token: int = 0


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank of a model in a layout. Raises `ConfigError` if the layout is impossible for the model."""

    # the model's sizes
    model: ModelConfig
    # the device of one rank
    hardware: HasMemory
    # the layout
    parallel: ParallelConfig
    # bytes of weights
    weights: WeightFormat
    # bytes of one element of the cache; 1 means quantised
    kv_element_bytes: int
    # tokens of a page
    page_size: int = 16
    # fraction of the device's memory to use, for weights, workspace and cache together
    memory_fraction: float = 0.9
    # ranks of one machine
    gpus_per_node: int = 8
    # the most tokens of a step, which bounds its activations
    max_num_batched_tokens: int = 8192
    # the most requests of a step, which bounds its logits
    max_num_seqs: int = 256
    # tokens of other shards whose KV a rank holds at once
    travelling_tokens: int = WORKSPACE_TOKENS
    # builds the model of its family
    build: BuildModel = DecoderModel
    # what a checkpoint of its own that drafts takes
    drafts: DraftBytes = DraftBytes()

    def __post_init__(self) -> None:
        check_heads(self.grid, self.model.num_q_heads)
        check_layers(self.grid, self.model.num_layers)

    @cached_property
    def grid(self) -> Grid:
        """The grid of ranks, with `gpus_per_node` ranks on each machine."""
        return Grid(replace(self.parallel, ranks_per_node=self.gpus_per_node))

    @cached_property
    def layout(self) -> KVLayout:
        """The cache's layout on the rank that holds the most layers and KV heads."""
        quantised = self.kv_element_bytes == 1
        return cache_layout(self.grid, self.model, self.kv_element_bytes, quantised, self.drafts.cached_token)

    @cached_property
    def attention(self) -> WeightPart:
        """Projections of one layer's attention on one rank. q, k and v are computed in one product."""
        products = requests_of(lambda context: build_attention(self.model, 0, "", context)).matrices
        return WeightPart(self._held(chain(*products)), self.weights.attention, len(products))

    @cached_property
    def ffn(self) -> WeightPart:
        """The MLP of one dense layer on one rank. Gate and up are computed in one product."""
        return self._part(lambda context: GatedMLP(self.model, "", context), self.weights.ffn)

    @cached_property
    def shared(self) -> WeightPart:
        """The shared expert of one MoE layer on one rank."""
        moe = self.model.moe
        return (
            self._of_mixture(shared_expert, self.weights.ffn) if moe and moe.shared_intermediate_size else WeightPart()
        )

    @cached_property
    def router(self) -> WeightPart:
        """The router of one MoE layer. Every rank holds all of it."""
        return self._of_mixture(ExpertRouter, self.weights.embedding)

    @cached_property
    def expert(self) -> WeightPart:
        """One routed expert, not divided."""
        return self._of_mixture(partial(routed_experts, experts=range(1)), self.weights.experts)

    @cached_property
    def experts_held(self) -> int:
        """Routed experts of one layer on the rank that holds the most of them."""
        moe = self.model.moe
        return -(-moe.num_experts // self.expert_holders) if moe else 0

    @cached_property
    def expert_holders(self) -> int:
        """Number of ranks over which the routed experts of a layer are split."""
        return len(self.grid.expert_holders(0))

    @cached_property
    def head(self) -> WeightPart:
        """The LM head, or the embedding, on one rank."""
        return self._part(lambda context: Embedding(self.model, context), self.weights.embedding)

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.model.moe.layers) if self.model.moe else 0

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights on the rank that holds the most of them."""
        if self.build is not DecoderModel:
            return max(map(self._bytes_as_built, range(self.grid.world_size))) + self.drafts.weights
        mixed = self.model.moe.layers if self.model.moe else frozenset()
        experts = self.shared.bytes + self.router.bytes + self.expert.bytes * self.experts_held
        each = [
            self.attention.bytes + (experts if n in mixed else self.ffn.bytes) for n in range(self.model.num_layers)
        ]
        stages = [sum(each[slice(*split_evenly(len(each), self.grid.pp, n))]) for n in range(self.grid.pp)]
        stages[0] += self.head.bytes
        # tied weights are held once only if the first stage is also the last
        if not self.model.tie_word_embeddings or len(stages) != 1:
            stages[-1] += self.head.bytes
        return max(*stages, stages[-1] + self._draft_bytes + self.drafts.weights)

    @property
    def _draft_bytes(self) -> float:
        """Bytes of the module that drafts, on a rank of the last stage: the embedding too, if that is not the first."""
        if not self.model.loaded_draft_layers:
            return 0.0
        experts = self.shared.bytes + self.router.bytes + self.expert.bytes * self.experts_held
        join = 2 * self.model.hidden_size**2 * self.weights.embedding
        embedding = self.head.bytes * min(self.grid.pp - 1, 1)
        return join + embedding + self.attention.bytes + (experts if self.model.moe else self.ffn.bytes)

    @property
    def workspace_bytes(self) -> float:
        """Bytes that a step needs at its peak: runtime, buffers for peers, activations and logits."""
        model, rows, activation = self.model, self.max_num_batched_tokens, self.weights.embedding
        wide = self._mixture_row(model.moe) if model.moe else 3 * model.intermediate_size / self.grid.tp
        tokens = rows * activation * (_HIDDEN_COPIES * model.hidden_size + wide)
        logits = _LOGIT_COPIES * self.max_num_seqs * model.vocab_size * 4
        return _RUNTIME_BYTES + _PEER_BYTES * (self.grid.world_size - 1) + tokens + logits

    def _mixture_row(self, moe: MoEConfig) -> float:
        """Elements that one token needs in an MoE layer: for each chosen expert its input, output and activations.

        Also for experts that other ranks hold: the shapes of a step do not depend on the routing.
        """
        return moe.experts_per_token * (2 * self.model.hidden_size + 3 * moe.intermediate_size)

    @property
    def cache_bytes(self) -> float:
        """Bytes left for the cache of a rank; negative if weights and workspace do not fit."""
        usable = self.hardware.memory_bytes * _USABLE * self.memory_fraction
        return usable - self.weight_bytes - self.workspace_bytes

    @property
    def pages_per_shard(self) -> tuple[int, ...]:
        """Number of pages of each shard; zeros if no page fits."""
        return (max(0, self.layout.pages_in(int(self.cache_bytes), self.page_size)),) * self.grid.num_shards

    @property
    def capacity_tokens(self) -> int:
        """Number of tokens that the cache holds, over all shards."""
        return sum(self.pages_per_shard) * self.page_size

    def missing_bytes(self, tokens: int) -> float:
        """Bytes that a rank lacks for one request of `tokens` tokens; zero or negative if the request fits."""
        pages = math.ceil(tokens / self.page_size / self.grid.num_shards)
        return pages * self.page_size * self.layout.bytes_per_token - self.cache_bytes

    def check_fits(self, tokens: int) -> None:
        """Raise `ConfigError`, with the GB that a rank lacks, unless a request of `tokens` tokens fits."""
        missing = self.missing_bytes(tokens)
        if missing > 0:
            raise ConfigError(
                "layout", self.parallel.name,
                f"a rank lacks {missing / 1e9:,.1f} GB for {tokens:,} tokens "
                f"(weights {self.weight_bytes / 1e9:,.1f} GB, workspace {self.workspace_bytes / 1e9:,.1f} GB)",
                "use more ranks, a smaller weight or cache format, or a shorter context",
            )  # fmt: skip

    def _part(self, build: Callable[[LayerContext], object], element_bytes: float) -> WeightPart:
        asked = requests_of(build)
        return WeightPart(self._held(asked.params), element_bytes, len(asked.matrices))

    def _of_mixture(
        self, build: Callable[[MoEConfig, int, str, LayerContext], object], element_bytes: float
    ) -> WeightPart:
        """A part of an MoE layer; empty if the model has no such layers."""
        moe, hidden = self.model.moe, self.model.hidden_size
        if moe is None:
            return WeightPart()
        return self._part(lambda context: build(moe, hidden, "", context), element_bytes)

    def _held(self, params: Iterable[Param]) -> int:
        """Number of elements of the parameters on the rank that holds the most of them."""
        found = list(params)
        return max(_elements(found, self._extent(rank)) for rank in self.grid.tp_group(0))

    def _bytes_as_built(self, rank: int) -> float:
        """Bytes of a rank's weights in a family with layers of its own, all of them in the dtype of activations."""
        extent = self._extent(rank)
        asked = requests_of(lambda context: self.build(self.model, context, torch.float32), extent)
        return _elements(set(asked.params), extent) * self.weights.embedding

    def _extent(self, rank: int) -> Extent:
        return Sharding(self.grid, rank, self.model.num_q_heads, self.model.num_kv_heads).extent


def _elements(params: Iterable[Param], extent: Extent) -> int:
    """Number of elements of the parameters on a rank that holds the part `extent` of each logical axis."""
    return sum(math.prod(stop - start for start, stop in param.bounds(extent)) for param in params)


def cache_layout(
    grid: Grid, model: ModelConfig, element_bytes: int, quantised: bool = False, draft_bytes: int = 0
) -> KVLayout:
    """The layout of a cached token on the rank where it takes the most bytes.

    That rank decides how many pages there are, because all ranks have the same number of them. `draft_bytes` are those
    of a checkpoint of its own that drafts, on the last stage.
    """
    kv_heads = max_kv_heads(grid, model.num_q_heads, model.num_kv_heads)
    groups = (model.mla.kv_lora_rank, model.mla.rope_dim) if model.mla else (model.head_dim,)
    stages = [model.cached_layers(*split_evenly(model.num_layers, grid.pp, stage)) for stage in range(grid.pp)]
    layouts = [
        KVLayout(
            stop - first, kv_heads, model.head_dim, element_bytes, model.kv_factor, groups if quantised else (),
            draft_bytes=draft_bytes if stop >= model.num_layers else 0,
        )
        for first, stop in stages
    ]  # fmt: skip
    return max(layouts, key=lambda layout: layout.bytes_per_token)


def attention_shape(grid: Grid, model: ModelConfig, layout: KVLayout, element_bytes: int) -> AttentionShape:
    """The sizes on one rank that attention's cost and bytes depend on. `element_bytes` are those of activations."""
    mla, expansion = model.mla, ExpansionCost()
    if mla:
        expansion = ExpansionCost.of(mla.kv_lora_rank, mla.rope_dim, mla.query_dim, mla.value_dim)
    start, stop = Sharding(grid, 0, model.num_q_heads, model.num_kv_heads).q_extent  # the same number on every rank
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


def pages_of_shards(cache: CacheConfig, grid: Grid, layout: KVLayout) -> tuple[int, ...]:
    """The number of pages of each shard. Raises `ConfigError` if the memory is too little, or a shard is left out."""
    if cache.pages_per_shard is None:
        pages = layout.pages_in(cache.memory_bytes or 0, cache.page_size)
        if not pages:
            need = layout.bytes_per_token * cache.page_size
            raise ConfigError(
                "kv_cache_memory_bytes", cache.memory_bytes,
                f"one page of {cache.page_size} tokens takes {need} bytes on a rank", f"give at least {need}",
            )  # fmt: skip
        return (pages,) * grid.num_shards
    if len(cache.pages_per_shard) != grid.num_shards:
        raise ConfigError(
            "pages_per_shard", cache.pages_per_shard,
            f"names {len(cache.pages_per_shard)} shards; pcp·dcp gives {grid.num_shards}",
            "give one number for each shard",
        )  # fmt: skip
    return cache.pages_per_shard
