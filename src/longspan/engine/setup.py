"""Resolve a user's configuration into the setup that every worker needs, before anything is allocated.

It owns the resolution of model, dtypes, lengths, page counts and backend; it must not load weights or start ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from longspan.attention.backends.base import AttentionBackend, BackendShape
from longspan.attention.backends.choice import Choice, choose_backend
from longspan.attention.cost import CostModel
from longspan.attention.schedules import Schedule
from longspan.attention.workload import AttentionShape, GroupShape
from longspan.cache.layout import KVLayout
from longspan.config import CostConstants, EngineConfig, require, require_choice
from longspan.engine.capacity import (
    WORKSPACE_TOKENS,
    DraftBytes,
    attention_shape,
    cache_layout,
    pages_of_shards,
)
from longspan.engine.computation import decide_computation, prepare_kernels
from longspan.engine.devices import choose_executor, resolve_device
from longspan.engine.draft_setup import DraftCheckpoint, DraftSetup
from longspan.engine.dtypes import QUANTISED, cache_dtype, check_cache_dtype, gpu_generation, model_dtype
from longspan.engine.extensions import NONE_ADDED, Extensions, carried_out
from longspan.engine.memory_use import MemoryUse
from longspan.engine.rank.scaled_weights import ScaledChoice, choose_scaled
from longspan.engine.speculation import DraftTarget, check_tokens, check_weights, find_checkpoint, with_draft_layers
from longspan.models.config import ModelConfig
from longspan.models.grouped import problem_of_grouped, problem_of_kernels
from longspan.models.registry import Family, find_family
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import check_heads, check_layers
from longspan.scheduler.limits import Limits
from longspan.weights.checkpoint import RandomWeights
from longspan.weights.source import ModelSource, find_source, naming_files_of, open_weights

_CPU_CACHE_BYTES = 1 << 30
_ALONE_ON_GPU = ("processes", "ray", "external")  # executors under which each rank has a GPU of its own


@dataclass(frozen=True)
class EngineSetup:
    """A resolved configuration."""

    # the user's options, with every `auto` that is decided here resolved
    config: EngineConfig
    # the model's files
    source: ModelSource
    # the model's architecture
    family: Family
    # the model's sizes
    model: ModelConfig
    # coordinates of the ranks
    grid: Grid
    # the cache's rows on the rank that holds the most
    layout: KVLayout
    # number of pages of each shard
    pages_per_shard: tuple[int, ...]
    # the most prompt and output tokens of a request
    max_model_len: int
    # `cpu` or `cuda`
    device_type: str
    # the attention backend, and why it was chosen
    backend: Choice
    # whether FP8 weights are kept, and why
    scaled: ScaledChoice
    # built-in schedules and those the caller has added, by name
    schedules: Mapping[str, Schedule]
    # what ranks have measured of a GPU's memory; None before they have, and where they do not
    memory: MemoryUse | None = None
    # the checkpoint of its own that drafts; None if there is none
    drafts: DraftSetup | None = None

    def with_pages(self, pages: int) -> EngineSetup:
        """A copy with this number of pages on every shard."""
        most = pages * self.config.cache.page_size
        scheduler = replace(self.config.scheduler, local_context=min(most, self.config.scheduler.local_context or 0))
        config = replace(self.config, scheduler=scheduler)
        return replace(self, config=config, pages_per_shard=(pages,) * self.grid.num_shards)

    def with_memory(self, memory: MemoryUse | None) -> EngineSetup:
        """A copy with the number of pages that ranks have measured; without a measurement, the same setup."""
        return self if memory is None else replace(self.with_pages(memory.pages), memory=memory)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return model_dtype(self.config, self.device_type)

    def device(self, number: int = 0) -> torch.device:
        """GPU `number` of this machine, or the CPU."""
        return torch.device(self.device_type, number) if self.device_type == "cuda" else torch.device("cpu")

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the cache's rows."""
        return cache_dtype(self.config, self.device_type)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the cache holds: pages × page size, summed over shards."""
        return sum(self.pages_per_shard) * self.config.cache.page_size

    @property
    def limits(self) -> Limits:
        """Limits on the length of one request."""
        schedule = self.config.scheduler.schedule
        return Limits.of(self.max_model_len, schedule, self.pages_per_shard, self.config.cache.page_size)

    @property
    def notes(self) -> list[str]:
        """Notes printed at start: the backend, kept FP8 weights, and drawbacks of the layout with their remedies."""
        chosen = [f"attention: {self.backend.name} ({self.backend.reason})"] if self.device_type == "cuda" else []
        measured = [self.memory.note] if self.memory else []
        products = self.config.products.notes if self.config.products else ()
        return [*chosen, *self.scaled.notes, *products, *measured, *self._virtual_notes, *self._layout_notes]

    @property
    def _virtual_notes(self) -> list[str]:
        ranks, threads = self.grid.world_size, self.config.executor == "threads"
        if self.device_type != "cuda" or ranks == 1 or not threads:
            return []
        return [f"all {ranks} ranks share one GPU; without --executor threads each has a GPU of its own"]

    @property
    def _layout_notes(self) -> list[str]:
        tp, kv_heads = self.grid.tp, self.model.num_kv_heads
        copies = self.grid.head_shards // kv_heads
        wider = self.config.parallel.decode_context_parallel_size * copies
        if copies < 2 or tp % wider:
            return []
        return [
            f"tensor_parallel_size={tp} keeps {copies} copies of the KV cache (the model has {kv_heads} KV heads); "
            f"--decode-context-parallel-size {wider} holds {copies} times the tokens"
        ]

    @property
    def backend_shape(self) -> BackendShape:
        """The sizes and dtypes that an attention backend must support."""
        return _backend_shape(self.config, self.model, self.device_type)

    @property
    def attention_shape(self) -> AttentionShape:
        """The sizes on one rank that the cost of a schedule depends on."""
        return attention_shape(self.grid, self.model, self.layout, self.dtype.itemsize)

    @property
    def records_decode(self) -> bool:
        """Whether decode steps are recorded as CUDA graphs.

        They are not with a mixture whose shapes depend on the routing, nor with pipeline stages, nor with several ranks
        that are threads of one process, nor where the ranks draft, which needs the hidden states: see `records_drafts`.
        """
        return self._is_recordable and not self.drafts_of_model

    @property
    def records_calls(self) -> bool:
        """Whether decode steps are recorded as calls of a CPU's kernels, if the model computes by these alone.

        Nothing is sent between the kernels of such a step. So they are with several ranks only where each has all heads
        and layers, and reads the pages of all in place.
        """
        whole = self.grid.tp == 1 and self.grid.pp == 1 and (self.maps_pools or self.grid.num_shards == 1)
        plain = not self.drafts_of_model and not self.config.enforce_eager
        return whole and plain and self.device_type == "cpu" and self.config.cpu_kernels == "compiled"

    @property
    def maps_pools(self) -> bool:
        """Whether ranks can read each other's pages in place."""
        return any(self.schedules[name].moves == "signals" for name in self.possible_schedules)

    @property
    def drafts_on_device(self) -> bool:
        """Whether a rank's device finds out which drafts are accepted.

        It needs all pages of a head shard on one rank, and backends that can write to slots that only it knows.
        """
        choices = (self.backend, *([self.drafts.backend] if self.drafts else ()))
        return self.grid.num_shards == 1 and all(choice.record.device_slots for choice in choices)

    @property
    def drafts_ahead(self) -> bool:
        """Whether drafts are verified before the driver knows them, and where they begin: see `Segment.slack`."""
        asked = bool(self.config.scheduler.async_scheduling) and self.drafts_of_model > 0
        return asked and self.drafts_on_device and self.grid.pp == 1 and self.config.executor != "dry"

    @property
    def records_drafts(self) -> bool:
        """Whether steps with drafts are recorded, and drafting too.

        Not where contexts are sharded, because ranks tell each other there what they have sampled before they draft,
        nor with a small model that is a mixture.
        """
        fixed = self.drafts is None or self.drafts.model.moe is None
        return self._is_recordable and self.drafts_on_device and fixed and self.drafts_of_model > 0

    @property
    def drafts_of_model(self) -> int:
        """How many draft tokens the ranks compute, with layers of the model or of a checkpoint of its own."""
        how = self.config.scheduler.speculative
        return how.tokens if how is not None and how.by_model else 0

    @property
    def _is_recordable(self) -> bool:
        """Whether steps of one size can be recorded: not on several ranks that are threads of one process."""
        alone = self.grid.world_size == 1 or self.config.executor != "threads"
        plain = self.grid.pp == 1 and not self.config.enforce_eager and self.device_type == "cuda"
        return alone and plain and self._has_fixed_shapes

    @property
    def records_short_steps(self) -> bool:
        """Whether short steps with prompt tokens are recorded too: where some schedule can be."""
        return self.records_decode and bool(self.recorded_schedules)

    @property
    def _has_fixed_shapes(self) -> bool:
        """Whether the shapes of a step follow from its numbers of rows, also where there is a mixture of experts."""
        moe, exchanges = self.model.moe, self.config.parallel.enable_expert_parallel
        if moe is None:
            return True
        device, sizes = torch.device(self.device_type), (self.model.hidden_size, moe.intermediate_size)
        problems = [problem_of_kernels(device, self.dtype)] if self.scaled.keeps else []
        if self.scaled.packed is None:  # experts in FP8 too may have slices that are dequantised
            problems.append(problem_of_grouped(device, self.dtype, *sizes))
        return not any(problems) and (self.gathers_rows or not exchanges)

    @property
    def gathers_rows(self) -> bool:
        """Whether every rank gets all rows for its experts, and not only those that chose them.

        On GPUs of one machine more bytes cost less than waiting for the numbers of rows.
        """
        return self.device_type == "cuda" and len(self.grid.nodes(self.grid.expert_group(0))) == 1

    @property
    def possible_schedules(self) -> tuple[str, ...]:
        """The schedules that a phase may have: `local`, and those under which something travels.

        With DCP there is no `local`: a page is on one rank of its TP group, and the others see it through that rank.
        """
        chosen, grid = self.config.scheduler.schedule, self.grid
        moving = [one.name for one in self.schedules.values() if one.moves and chosen in ("auto", one.name)]
        local = [one.name for one in self.schedules.values() if not one.moves and grid.num_shards == grid.pcp]
        return (*local, *(moving if grid.num_shards > 1 else ()))

    @property
    def recorded_schedules(self) -> tuple[str | None, ...]:
        """What steps are recorded with: None where all rows are local, and each schedule under which all may travel."""
        fixed = [self.schedules[name] for name in self.possible_schedules if self.schedules[name].recordable]
        return tuple(one.name if one.moves else None for one in fixed)

    @property
    def measures_cost(self) -> bool:
        """Whether the cost model's constants are measured at start: only where there is a schedule to choose."""
        chooses = self.config.scheduler.schedule == "auto" and self.grid.num_shards != 1
        return chooses and self.config.cost is None and self.config.executor != "dry"

    def cost_model(self, constants: CostConstants) -> CostModel:
        """The cost model of attention under this layout."""
        threads, grid = self.config.executor == "threads", self.grid
        lends = threads and self.device_type == "cpu" and self.config.num_threads is None
        group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)), threads, lends, self.maps_pools)
        return CostModel(self.attention_shape, group, self.schedules, constants, WORKSPACE_TOKENS)


def resolve(
    config: EngineConfig, extensions: Extensions = NONE_ADDED, needs_weights: bool | None = None
) -> EngineSetup:
    """Resolve a configuration, for the model that it names. Raises `ConfigError` or `ModelError`.

    Without `needs_weights` the weights are neither opened nor checked; None: whatever the executor needs.
    """
    device_type = resolve_device(config.device)
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    executor = choose_executor(config.executor, device_type, config.parallel.world_size, gpus, extensions != NONE_ADDED)
    config = replace(config, executor=executor)
    if device_type == "cuda":
        config = replace(config, scheduler=config.scheduler.on_gpus(config.parallel.prefill_context_parallel_size))
    families = extensions.all_families(executor)
    schedules = carried_out(extensions.all_schedules(executor), config, device_type)
    require_choice("schedule", config.scheduler.schedule, ("auto", *schedules))
    needs_weights = executor != "dry" if needs_weights is None else needs_weights
    if needs_weights:
        prepare_kernels(config, device_type)
    check_cache_dtype(config, device_type)
    grid = Grid(config.parallel)
    is_dummy = config.load_format == "dummy"
    opens_weights = needs_weights and not is_dummy
    source = replace(find_source(config.model, opens_weights, config.revision), tokenizer=config.tokenizer)
    with naming_files_of(source):
        family, model = find_family(source.config, families)
    model = with_draft_layers(config.scheduler.speculative, model)
    if opens_weights:
        source = open_weights(source)
        with naming_files_of(source):
            check_weights(family, model, source.checkpoint)
    elif is_dummy:
        source = replace(source, checkpoint=RandomWeights())
    check_heads(grid, model.num_q_heads)
    check_layers(grid, model.num_layers)
    _check_experts(config, model)
    device, kind, how = torch.device(device_type), model_dtype(config, device_type), config.scheduler.speculative
    target, length = DraftTarget(family, model, grid), _longest(config, model)
    own = find_checkpoint(config, target, families, opens_weights)
    if needs_weights and config.products is None:  # once, in the first process
        if how and own and opens_weights:
            check_tokens(how, source, own, model)
        config = decide_computation(config, source, family, model, device_type)
    backends = extensions.all_backends(executor)
    drafts = None if own is None else _cached_drafts(config, own, grid, device_type, backends)
    scaled = choose_scaled(config.quantization, source, device, kind) if opens_weights else ScaledChoice()
    config = _with_cache_bytes(config, source, target, scaled, device_type, drafts)
    quantised, shape = config.cache.dtype in QUANTISED, _backend_shape(config, model, device_type)
    backend = choose_backend(config.attention_backend, device_type, shape, backends)
    draft_bytes = drafts.layout.bytes_per_token if drafts else 0
    layout = cache_layout(grid, model, cache_dtype(config, device_type).itemsize, quantised, draft_bytes)
    pages = pages_of_shards(config.cache, grid, layout)
    scheduler = config.scheduler.on_shards(max(pages) * config.cache.page_size)
    if scheduler.async_scheduling is None:
        scheduler = replace(scheduler, async_scheduling=device_type == "cuda")
    config = replace(config, scheduler=scheduler)
    return EngineSetup(
        config, source, family, model, grid, layout, pages, length, device_type, backend, scaled, schedules,
        drafts=drafts,
    )  # fmt: skip


def _longest(config: EngineConfig, model: ModelConfig) -> int:
    """The most tokens of a request."""
    limit = model.max_position_embeddings
    length = config.scheduler.max_model_len or limit
    problem, remedy = f"exceeds the {limit} positions the model was made for", f"use at most {limit}"
    require(length <= limit, "max_model_len", length, problem, remedy)
    return length


def _cached_drafts(
    config: EngineConfig, own: DraftCheckpoint, grid: Grid, device_type: str, backends: Mapping[str, AttentionBackend]
) -> DraftSetup:
    """How the keys and values of a checkpoint of its own that drafts are cached."""
    quantised, dtype, stage = config.cache.dtype in QUANTISED, model_dtype(config, device_type), grid.one_stage
    layout = cache_layout(stage, own.model, cache_dtype(config, device_type).itemsize, quantised)
    shape = _backend_shape(config, own.model, device_type)
    chosen = choose_backend(config.attention_backend, device_type, shape, backends)
    return DraftSetup(own, layout, chosen, shape, attention_shape(stage, own.model, layout, dtype.itemsize))


def _backend_shape(config: EngineConfig, model: ModelConfig, device_type: str) -> BackendShape:
    """What an attention backend must support for a model under a configuration whose kernels are decided."""
    return BackendShape(
        model.head_dim, model.cached_value_dim, model.kv_factor, config.cache.dtype in QUANTISED,
        model_dtype(config, device_type), config.cpu_kernels == "compiled", gpu_generation(device_type),
    )  # fmt: skip


def _check_experts(config: EngineConfig, model: ModelConfig) -> None:
    require(
        model.moe is not None or not config.parallel.enable_expert_parallel,
        "enable_expert_parallel", True, f"{model.architecture} has no experts", "leave it out",
    )  # fmt: skip


def _with_cache_bytes(
    config: EngineConfig, source: ModelSource, target: DraftTarget, scaled: ScaledChoice, device_type: str,
    drafts: DraftSetup | None,
) -> EngineConfig:  # fmt: skip
    """The configuration with the cache's memory decided.

    The first process decides and ranks in other processes get its number, so that all have the same number of pages.
    Where each rank has a GPU of its own and the user has said nothing, this is an estimate: ranks measure, and replace
    it.
    """
    if config.cache.memory_settled:
        return config
    found = config.cache.memory_bytes or _CPU_CACHE_BYTES
    if device_type == "cuda":
        from longspan.engine.memory import cache_bytes, weight_format
        from longspan.engine.nvml import free_bytes

        sharing = config.parallel.world_size if config.executor == "threads" else 1
        dtype, model = model_dtype(config, device_type), target.model
        needed = drafts.needs(target.grid, dtype) if drafts else DraftBytes()
        found = cache_bytes(
            config, model, weight_format(source.config, dtype, scaled), cache_dtype(config, device_type).itemsize,
            free_bytes() // sharing, target.family.build, needed,
        )  # fmt: skip
    alone = config.executor in _ALONE_ON_GPU or config.parallel.world_size == 1
    given = config.cache.memory_bytes is not None or config.cache.pages_per_shard is not None
    measured = device_type == "cuda" and alone and not given and config.executor != "dry"
    cache = replace(config.cache, memory_bytes=found, memory_settled=True, memory_measured=measured)
    return replace(config, cache=cache)
