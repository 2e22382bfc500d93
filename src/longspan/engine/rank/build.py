"""Build one rank: weights, KV pool, attention and process groups.

It owns the assembly; it must not know whether ranks are threads or processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import RecordableBackend
from longspan.attention.schedules import ContextGroup
from longspan.compiled.recording import NotRecordable
from longspan.config import CostConstants
from longspan.disaggregation.rank import open_transfer
from longspan.engine.free_memory import return_free_memory
from longspan.engine.memory_use import MemoryUse
from longspan.engine.rank.draft_chain import DraftChain
from longspan.engine.rank.draft_graphs import DraftGraphs, RecordedParts, verification_sizes
from longspan.engine.rank.drafting import Drafter, ModuleDrafter
from longspan.engine.rank.graphs import GraphRunner, graph_sizes
from longspan.engine.rank.loading import RankLoader, TensorStore
from longspan.engine.rank.page_store import PageStore
from longspan.engine.rank.profile import CudaMemory, measure, require_room
from longspan.engine.rank.progress import progress_bar
from longspan.engine.rank.rank_attention import build_attention, context_group, measure_cost
from longspan.engine.rank.recorder import CountedRecorder, CudaRecorder, KernelRecorder
from longspan.engine.rank.runner import Groups, RankParts, Runner
from longspan.engine.rank.sampling.grammar import Vocabulary
from longspan.engine.rank.sampling.gumbel import draw_plainly
from longspan.engine.rank.sampling.recorded import Draw
from longspan.engine.rank.sampling.sampler import batch_draw
from longspan.engine.rank.settled_rows import Carried
from longspan.engine.rank.short_steps import SHORT_SIZES, ShortSteps, short_sizes, unexpanded
from longspan.engine.rank.warmup import warm_up
from longspan.engine.setup import EngineSetup
from longspan.models.context import Alone, DraftModule, LayerContext, Model
from longspan.models.decoder import DecoderModel
from longspan.models.ops import choose_ops
from longspan.models.ops.base import LayerOps
from longspan.models.shapes import requests_of
from longspan.parallel.collectives import Collectives
from longspan.parallel.experts import GatheredExperts, SharedExperts
from longspan.parallel.pipeline import Pipeline
from longspan.parallel.sharding import Sharding
from longspan.plan.reach import Place
from longspan.weights.tokenizer import load_serialised

_LOG = logging.getLogger("longspan.engine")


class TensorParallelGroup:
    """The TP group, as the interface that model layers use."""

    def __init__(self, group: Collectives, vocab_sizes: Sequence[int]) -> None:
        self._group = group
        self._vocab_sizes = vocab_sizes

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` [...] over the members of the group."""
        return self._group.all_reduce(x, "tp")

    def sum_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """See `TensorParallel.sum_add_norm`."""
        return self._group.sum_add_norm(x, residual, weight, eps, "tp")

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

    `make_group` opens a group of this rank. All ranks must call this at the same time: they open groups and agree.
    """
    grid, model_config, config = setup.grid, setup.model, setup.config
    device_memory = CudaMemory(store.device) if config.cache.memory_measured else None
    at_start = device_memory.free() if device_memory else 0
    shardings = [Sharding(grid, r, model_config.num_q_heads, model_config.num_kv_heads) for r in range(grid.world_size)]
    sharding = shardings[rank]
    groups, everyone = _open_groups(setup, rank, make_group)
    tp = _tensor_parallel(groups.tp, [shardings[peer] for peer in grid.tp_group(rank)], model_config.vocab_size)
    experts = _expert_group(setup, rank, shardings, make_group)
    context = LayerContext(RankLoader(store, sharding), tp, experts, _layer_ops(setup, store))
    model = _load(setup, store, context, sharding, shown=rank == 0)
    module = _draft_module(setup, store, rank, model, groups.tp)
    draw = agreed_draw(everyone, store.device)

    def parts_with(setup: EngineSetup) -> RankParts:
        layers = range(*model_config.cached_layers(*sharding.extent("layers", model_config.num_layers)))
        group = context_group(setup, rank, groups.context)
        attention = build_attention(setup, setup, sharding, layers, group, store.device)
        gathered = experts if isinstance(experts, GatheredExperts) else None
        return RankParts(
            grid, rank, model, attention, groups, store.device,
            vocabulary, config.cache.page_size, config.debug, bool(config.scheduler.async_scheduling),
            draw=draw, experts=gathered,
            drafter=None if module is None else _drafter(setup, rank, (model, module), attention, group, gathered),
        )  # fmt: skip

    def pilot(setup: EngineSetup) -> tuple[Runner, GraphRunner | DraftGraphs | None]:
        parts = parts_with(setup)
        return Runner(parts), _graphs(setup, parts) or _draft_graphs(setup, parts)

    memory = None
    if device_memory is not None:
        with progress_bar("measuring memory", 1, shown=rank == 0):
            use = measure(setup, device_memory, at_start, pilot)
        memory = replace(use, pages=_smallest(use.room, everyone, store.device))
        require_room(memory, config.cache.gpu_memory_utilization)
        setup = setup.with_memory(memory)
    parts = parts_with(setup)
    pool, transfer, drafted = parts.attention.pool, config.transfer, parts.drafter.own_pool if parts.drafter else None
    constants = measure_cost(setup, rank, groups.context, store.device) if setup.measures_cost else None
    runner = Runner(replace(
        parts,
        cuda_graphs=_graphs(setup, parts),
        drafter=parts.drafter.with_graphs(_draft_graphs(setup, parts)) if parts.drafter else None,
        store=PageStore(setup, rank, pool, drafts=drafted) if config.cache.offload.is_on else None,
        transfer=None if transfer is None else open_transfer(transfer, setup, rank, pool),
    ))  # fmt: skip
    if store.device.type == "cuda":
        make_ready(runner, setup, shown=rank == 0)
    return BuiltRank(runner, constants, memory)


def _open_groups(
    setup: EngineSetup, rank: int, make_group: Callable[[Sequence[int]], Collectives]
) -> tuple[Groups, Sequence[Collectives]]:
    """The groups of a rank, and those that connect all ranks (see `_smallest`). Says how the TP group sums."""
    stages = make_group(setup.grid.pipeline_group(rank))
    tp, context = make_group(setup.grid.tp_group(rank)), make_group(setup.grid.context_group(rank))
    found = None if setup.config.parallel.disable_custom_all_reduce else tp.open_fast_sums()
    if found is not None and rank == 0:
        fast, how = found
        _LOG.log(logging.INFO if fast else logging.WARNING, "sums over the TP group: %s", how)
    return Groups(tp, context, Pipeline(stages)), (tp, context, stages)


def _layer_ops(setup: EngineSetup, store: TensorStore) -> LayerOps:
    """The operations between matrix products, as the driver has decided."""
    return choose_ops(store.device, setup.config.cpu_kernels == "compiled")


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
        model = setup.family.build(setup.model, context, setup.dtype)
        return_free_memory()
        return model
    asked = requests_of(lambda shapes: setup.family.build(setup.model, shapes, setup.dtype), sharding.extent)
    with progress_bar("loading weights", len(asked.params), shown) as store.on_read:
        return setup.family.build(setup.model, context, setup.dtype)


def _graphs(setup: EngineSetup, parts: RankParts) -> GraphRunner | None:
    """The graphs of a rank, none of them recorded yet; None if decode steps are not recorded."""
    backend, config = parts.attention.ops.backend, setup.config
    if not isinstance(backend, RecordableBackend):
        return None
    sizes = graph_sizes(config.scheduler.running_limit, config.cudagraph_capture_sizes)
    if setup.records_calls:
        return _recorded_calls(setup, parts, backend, sizes[-1])
    if not setup.records_decode:
        return None
    recorder, short = CountedRecorder(CudaRecorder(parts.device), parts.groups.context.traffic), None
    pcp, schedules = setup.grid.pcp, setup.recorded_schedules
    if backend.causal_runs and (of_short := short_sizes(setup)):
        short = ShortSteps(
            parts.model, parts.attention, backend, recorder, of_short,
            schedules=[name for name in schedules if name], pcp=pcp, shared=None not in schedules,
        )  # fmt: skip
    return GraphRunner(parts.model, parts.attention, backend, recorder, pcp, sizes, short, parts.draw)


def _recorded_calls(setup: EngineSetup, parts: RankParts, backend: RecordableBackend, most: int) -> GraphRunner | None:
    """The decode steps of a rank on a CPU: one recording for up to `most` rows, which computes those that a step has.

    None if something in them is not computed by compiled kernels.
    """
    recorder, pcp = KernelRecorder(most), setup.grid.pcp
    recorded = GraphRunner(parts.model, parts.attention, backend, recorder, pcp, (most,), sends=False)
    try:
        recorded.record((None,))
    except NotRecordable as reason:
        _LOG.info("decode steps are not recorded: %s", reason)
        return None
    return recorded


def agreed_draw(groups: Sequence[Collectives], device: torch.device) -> Draw | None:
    """How batches are drawn on all ranks: by plain operations, if one rank cannot use kernels. See `_smallest`.

    Ranks of a TP group each draw the tokens of the next step, and kernels round sums of probabilities differently.
    """
    draw = batch_draw(device.type)
    if draw is None or _smallest(int(draw is not draw_plainly), groups, device):
        return draw
    return draw_plainly


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
    if runner.drafter is not None:
        runner.drafter.record(shown)
    warm_up(runner, setup, shown)


def _draft_module(
    setup: EngineSetup, store: TensorStore, rank: int, model: Model, tp_group: Collectives
) -> DraftModule | None:
    """What drafts on a rank, with its weights; None where the ranks do not draft, and before the last stage."""
    drafts, grid = setup.drafts, setup.grid
    if drafts is None or store.drafts is None or model.head is None:
        return model.draft_module if setup.model.loaded_draft_layers else None
    checkpoint = drafts.checkpoint
    shardings = [checkpoint.sharding(grid, peer) for peer in grid.tp_group(rank)]
    tp = _tensor_parallel(tp_group, shardings, drafts.model.vocab_size)
    loader = RankLoader(store.drafts, checkpoint.sharding(grid, rank))
    context = LayerContext(loader, tp, Alone(), _layer_ops(setup, store))
    return checkpoint.build(context, setup.dtype, model.embedding)


def _drafter(
    setup: EngineSetup, rank: int, models: tuple[Model, DraftModule], attention: Attention, group: ContextGroup,
    experts: GatheredExperts | None,
) -> Drafter:  # fmt: skip
    """What drafts for a model with a module, whose layers are the model's or have attention of their own."""
    place, drafts, tokens = setup.grid.ranks[rank], setup.drafts, setup.drafts_of_model
    device = attention.pool.device
    if drafts is not None:
        sharding = drafts.checkpoint.sharding(setup.grid, rank)
        attention = build_attention(setup, drafts, sharding, range(drafts.model.num_layers), group, device)
        experts = None
    model, module = models
    here = Place(place.pcp, place.shard, setup.grid.shards_of_pcp)
    # steps of a warm-up have one request more than may run
    carried = Carried(tokens, setup.config.scheduler.running_limit + 1, device) if setup.drafts_ahead else None
    chain = DraftChain(module, attention, here, tokens, carried)
    return ModuleDrafter(
        module, tokens, attention, here, group.collectives, _draft_schedule(setup), experts, device,
        has_own_attention=drafts is not None,
        observed=(lambda: model.observed) if isinstance(model, DecoderModel) else (lambda: None),
        chain=chain if setup.drafts_on_device else None,
    )  # fmt: skip


def _draft_graphs(setup: EngineSetup, parts: RankParts) -> DraftGraphs | None:
    """The graphs of steps with drafts, none of them recorded yet; None if they are not recorded."""
    drafter, backend, scheduler = parts.drafter, parts.attention.ops.backend, setup.config.scheduler
    if not setup.records_drafts or not isinstance(drafter, ModuleDrafter) or drafter.chain is None:
        return None
    own = drafter.attention.ops.backend
    if not isinstance(backend, RecordableBackend) or not isinstance(own, RecordableBackend) or not backend.causal_runs:
        return None
    found = RecordedParts(parts.model, parts.attention, backend, drafter.chain, own, drafter.first_input)
    most = min(scheduler.running_limit * (drafter.tokens + 1), scheduler.step_tokens)
    sizes = verification_sizes(most, drafter.tokens, setup.config.cudagraph_capture_sizes)
    # latents are read as they are, by the model and by what drafts
    prompts = unexpanded(SHORT_SIZES, parts.attention.preparer.expansion, drafter.attention.preparer.expansion)
    recorder = CountedRecorder(CudaRecorder(parts.device), parts.groups.context.traffic)
    return DraftGraphs(found, recorder, sizes, prompts)


def _draft_schedule(setup: EngineSetup) -> str:
    """The schedule of runs that are not known to the scheduler, which chooses that of every step: one row a request."""
    moving = [name for name in setup.possible_schedules if setup.schedules[name].moves]
    return (moving or setup.possible_schedules)[0]


def _tensor_parallel(group: Collectives, shardings: Sequence[Sharding], tokens: int) -> TensorParallelGroup:
    """The TP group of ranks with these parts of a vocabulary of `tokens` tokens."""
    vocab = [sharding.extent("vocab", tokens) for sharding in shardings]
    return TensorParallelGroup(group, [stop - start for start, stop in vocab])
