"""Build one rank: weights, KV pool, attention and process groups.

It owns the assembly; it must not know whether ranks are threads or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.calibrate import Calibration
from longspan.attention.pool import KVPool
from longspan.attention.schedules import ContextGroup
from longspan.attention.variants import AttentionOps, Heads
from longspan.config import CostConstants
from longspan.disaggregation.rank import open_transfer
from longspan.engine.capacity import WORKSPACE_TOKENS
from longspan.engine.memory_use import MemoryUse
from longspan.engine.rank.drafting import Drafter, ModuleDrafter
from longspan.engine.rank.graphs import GraphRunner, graph_sizes
from longspan.engine.rank.loading import RankLoader, TensorStore
from longspan.engine.rank.page_store import PageStore
from longspan.engine.rank.profile import CudaMemory, measure, require_room
from longspan.engine.rank.progress import progress_bar
from longspan.engine.rank.recorder import CudaRecorder
from longspan.engine.rank.runner import Groups, RankParts, Runner
from longspan.engine.rank.sampling.grammar import Vocabulary
from longspan.engine.rank.sampling.sampler import batch_draw
from longspan.engine.rank.short_steps import ShortSteps
from longspan.engine.rank.warmup import warm_up
from longspan.engine.setup import EngineSetup
from longspan.models.context import Alone, LayerContext, Model
from longspan.models.ops import choose_ops
from longspan.models.shapes import requests_of
from longspan.parallel.collectives import Collectives
from longspan.parallel.experts import GatheredExperts, SharedExperts
from longspan.parallel.pipeline import Pipeline
from longspan.parallel.sharding import Sharding
from longspan.plan.reach import Place
from longspan.weights.tokenizer import load_serialised


class TensorParallelGroup:
    """The TP group, as the interface that model layers use."""

    def __init__(self, group: Collectives, vocab_sizes: Sequence[int]) -> None:
        self._group = group
        self._vocab_sizes = vocab_sizes

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` [...] over the members of the group."""
        return self._group.all_reduce(x, "tp")

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Concatenate the members' slices of the vocabulary: [..., own slice] to [..., vocab]."""
        parts = self._group.all_gather(x, self._vocab_sizes, "tp", dim=x.dim() - 1)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def build_vocabulary(setup: EngineSetup) -> Vocabulary:
    """The vocabulary for grammars, of which ranks in one process need only one."""
    model = setup.model
    vocabulary = Vocabulary(lambda: load_serialised(setup.source), model.vocab_size, model.eos_token_ids)
    if setup.config.read_vocabulary_ahead:
        vocabulary.read_ahead()
    return vocabulary


@dataclass(frozen=True)
class BuiltRank:
    """A rank that is ready."""

    # runs plans
    runner: Runner
    # the cost model's constants; None unless the setup asks to measure them
    constants: CostConstants | None
    # what the rank has measured of its GPU's memory; None where ranks do not measure it
    memory: MemoryUse | None


def build_runner(
    setup: EngineSetup,
    rank: int,
    store: TensorStore,
    vocabulary: Vocabulary,
    make_group: Callable[[Sequence[int]], Collectives],
) -> BuiltRank:
    """Build one rank.

    `make_group` opens a group of ranks for this rank. All ranks must call `build_runner` at the same time, because
    opening groups and measuring are collective.
    """
    grid, model_config, config = setup.grid, setup.model, setup.config
    device_memory = CudaMemory(store.device) if config.cache.memory_measured else None
    at_start = device_memory.free() if device_memory else 0
    shardings = [Sharding(grid, r, model_config.num_q_heads, model_config.num_kv_heads) for r in range(grid.world_size)]
    sharding = shardings[rank]
    stages = make_group(grid.pipeline_group(rank))
    groups = Groups(make_group(grid.tp_group(rank)), make_group(grid.context_group(rank)), Pipeline(stages))
    vocab = [shardings[peer].extent("vocab", model_config.vocab_size) for peer in grid.tp_group(rank)]
    tp = TensorParallelGroup(groups.tp, [stop - start for start, stop in vocab])
    experts = _expert_group(setup, rank, shardings, make_group)
    context = LayerContext(RankLoader(store, sharding), tp, experts, choose_ops(store.device))
    model = _load(setup, store, context, sharding, shown=rank == 0)

    def parts_with(setup: EngineSetup) -> RankParts:
        attention = _attention(setup, sharding, groups.context, store.device)
        gathered = experts if isinstance(experts, GatheredExperts) else None
        return RankParts(
            grid, rank, model, attention, groups, store.device,
            vocabulary, config.cache.page_size, config.debug, bool(config.scheduler.async_scheduling),
            experts=gathered, drafter=_drafter(setup, rank, model, attention, groups.context, gathered),
        )  # fmt: skip

    def pilot(setup: EngineSetup) -> tuple[Runner, GraphRunner | None]:
        parts = parts_with(setup)
        return Runner(parts), _graphs(setup, parts)

    memory = None
    if device_memory is not None:
        use = measure(setup, device_memory, at_start, pilot)
        memory = replace(use, pages=_smallest(use.room, (groups.tp, groups.context, stages), store.device))
        require_room(memory, config.cache.gpu_memory_utilization)
        setup = setup.with_memory(memory)
    parts = parts_with(setup)
    pool, transfer = parts.attention.pool, config.transfer
    constants = measure_cost(setup, rank, groups.context, store.device) if setup.measures_cost else None
    parts = replace(
        parts,
        cuda_graphs=_graphs(setup, parts),
        store=PageStore(setup, rank, pool) if config.cache.offload.is_on else None,
        transfer=None if transfer is None else open_transfer(transfer, setup, rank, pool),
    )
    runner = Runner(parts)
    if store.device.type == "cuda":
        make_ready(runner, setup, shown=rank == 0)
    return BuiltRank(runner, constants, memory)


def _expert_group(
    setup: EngineSetup, rank: int, shardings: Sequence[Sharding], make_group: Callable[[Sequence[int]], Collectives]
) -> GatheredExperts | SharedExperts | Alone:
    """The group over which the experts of a mixture are split."""
    moe = setup.model.moe
    if moe is None or not setup.config.parallel.enable_expert_parallel:
        return Alone()
    peers = setup.grid.expert_group(rank)
    group = make_group(peers)
    if setup.gathers_rows:
        return GatheredExperts(group)
    return SharedExperts(group, [shardings[peer].extent("experts", moe.num_experts) for peer in peers])


def _load(setup: EngineSetup, store: TensorStore, context: LayerContext, sharding: Sharding, shown: bool) -> Model:
    """Build the model with its weights. With `shown` there is a progress bar."""
    if not shown or store.device.type != "cuda":
        return setup.family.build(setup.model, context, setup.dtype)
    asked = requests_of(lambda shapes: setup.family.build(setup.model, shapes, setup.dtype), sharding.extent)
    with progress_bar("loading weights", len(asked.params), shown) as store.on_read:
        return setup.family.build(setup.model, context, setup.dtype)


def _drafter(
    setup: EngineSetup, rank: int, model: Model, attention: Attention, context: Collectives,
    experts: GatheredExperts | None,
) -> Drafter | None:  # fmt: skip
    """What drafts tokens on a rank; None where the ranks do not draft, and before the last stage."""
    how, module = setup.config.scheduler.speculative, model.draft_module if setup.model.loaded_draft_layers else None
    if how is None or module is None:
        return None
    place = setup.grid.ranks[rank]
    return ModuleDrafter(
        module, how.tokens, attention, Place(place.pcp, place.shard, setup.grid.shards_of_pcp), context,
        _draft_schedule(setup), experts, attention.pool.device,
    )  # fmt: skip


def _draft_schedule(setup: EngineSetup) -> str:
    """The schedule of runs that are not known to the scheduler, which chooses that of every step: one row a request."""
    moving = [name for name in setup.possible_schedules if setup.schedules[name].moves]
    return (moving or setup.possible_schedules)[0]


def _graphs(setup: EngineSetup, parts: RankParts) -> GraphRunner | None:
    """The graphs of a rank, none of them recorded yet; None if decode steps are not recorded."""
    backend, config = parts.attention.ops.backend, setup.config
    if not setup.records_decode or not isinstance(backend, RecordableBackend):
        return None
    sizes = graph_sizes(config.scheduler.running_limit, config.cudagraph_capture_sizes)
    recorder, short = CudaRecorder(parts.device), None
    if setup.records_short_steps and backend.causal_runs:
        short = ShortSteps(parts.model, parts.attention, backend, recorder)
    draw = batch_draw(parts.device.type)
    return GraphRunner(parts.model, parts.attention, backend, recorder, setup.grid.pcp, sizes, short, draw)


def _smallest(number: int, groups: Sequence[Collectives], device: torch.device) -> int:
    """The smallest number of all ranks, given groups that connect them all when joined one after the other."""
    for group in groups:
        mine = torch.tensor([number], device=device)
        number = min(int(each) for each in group.all_gather(mine, [1] * group.size, "start"))
    return number


def make_ready(runner: Runner, setup: EngineSetup, shown: bool) -> None:
    """Record the decode steps and run every other kernel once. All ranks must do so at the same time.

    With `shown` there are progress bars.
    """
    if runner.cuda_graphs is not None:
        runner.cuda_graphs.record(setup.recorded_schedules, shown)
    warm_up(runner, setup, shown)


def measure_cost(setup: EngineSetup, rank: int, group: Collectives, device: torch.device) -> CostConstants:
    """Measure the constants of the cost model. All ranks of a context group must do so at the same time."""
    grid, model = setup.grid, setup.model
    place = Place(grid.ranks[rank].pcp, grid.ranks[rank].shard, grid.shards_of_pcp)
    ops = _ops(setup, Sharding(grid, rank, model.num_q_heads, model.num_kv_heads), device)
    context = _context(setup, rank, group)
    return Calibration(ops, context, place, setup.attention_shape, setup.schedules, setup.dtype, device).measure()


def _context(setup: EngineSetup, rank: int, group: Collectives) -> ContextGroup:
    nodes = setup.grid.nodes(setup.grid.context_group(rank))
    return ContextGroup(group, setup.grid.shards_of_pcp, nodes, WORKSPACE_TOKENS)


def _ops(setup: EngineSetup, sharding: Sharding, device: torch.device) -> AttentionOps:
    model = setup.model
    return AttentionOps(
        setup.backend.record.build(device, setup.backend_shape),
        Heads.of(sharding),
        model.attention_scale,
        model.cached_value_dim,
        setup.attention_shape.expansion,
    )


def _attention(setup: EngineSetup, sharding: Sharding, group: Collectives, device: torch.device) -> Attention:
    start, stop = sharding.kv_extent
    pool = KVPool(
        setup.layout.with_kv_heads(stop - start),
        range(*setup.model.cached_layers(*sharding.extent("layers", setup.model.num_layers))),
        setup.pages_per_shard[setup.grid.ranks[sharding.rank].shard],
        setup.config.cache.page_size,
        setup.cache_dtype,
        device,
    )
    context = _context(setup, sharding.rank, group)
    return Attention(pool, _ops(setup, sharding, device), context, setup.model.layer_groups, setup.schedules)
