"""Time every schedule of attention in the same situations, and compare the cost model's choice with the fastest.

It owns the situations, the ranks' tensors and the timing; the schedules are the engine's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.calibrate import Calibration, combine
from longspan.attention.cost import CostModel
from longspan.attention.layer import AttentionLayer
from longspan.attention.pool import KVPool
from longspan.attention.schedules import SCHEDULES, ContextGroup
from longspan.attention.variants import AttentionOps, Heads
from longspan.attention.workload import GroupShape
from longspan.bench.ranks import MakeGroup, run_on_ranks
from longspan.bench.situation import LaidOut, Situation, estimates, lay_out
from longspan.cache.layout import KVLayout
from longspan.clock import now
from longspan.config import CostConstants, ParallelConfig
from longspan.engine.capacity import WORKSPACE_TOKENS, attention_shape, cache_layout
from longspan.models.config import MLAConfig, ModelConfig, RopeConfig
from longspan.models.mla import LatentSpace
from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding
from longspan.plan.reach import Place
from longspan.plan.view import rank_view

_MOVES = {name: schedule.moves for name, schedule in SCHEDULES.items()}
# not where pages are read in place, which only ranks of one kind can do
_COMPARED = {name: schedule for name, schedule in SCHEDULES.items() if schedule.moves != "signals"}
_MEASURED = [name for name, schedule in _COMPARED.items() if schedule.moves is not None]
_ELEMENT_BYTES = 4  # queries and cached rows are fp32


@dataclass(frozen=True)
class HeadShape:
    """The heads of a model, as the configuration of one layer."""

    name: str  # for people
    model: ModelConfig  # one layer; sizes that do not concern attention are arbitrary

    @staticmethod
    def of(name: str, q_heads: int, kv_heads: int, head_dim: int, mla: MLAConfig | None = None) -> HeadShape:
        """`head_dim` is the width of a cached row; with MLA that of latent and rotary key together."""
        model = ModelConfig(
            architecture=name, num_layers=1, hidden_size=1, num_q_heads=q_heads, num_kv_heads=kv_heads,
            head_dim=head_dim, intermediate_size=1, vocab_size=1, max_position_embeddings=1, rms_norm_eps=1.0,
            rope=RopeConfig(), mla=mla,
        )  # fmt: skip
        return HeadShape(name, model)

    @property
    def query_dim(self) -> int:
        """Width of one query head."""
        mla = self.model.mla
        return mla.query_dim + mla.rope_dim if mla else self.model.head_dim

    def layer(self, q_heads: int) -> AttentionLayer:
        """An attention layer; with MLA it has random projections [Hq, D, rank] of `q_heads` heads."""
        mla = self.model.mla
        if mla is None:
            return AttentionLayer(0)
        to_key = torch.randn(q_heads, mla.query_dim, mla.kv_lora_rank) * mla.kv_lora_rank**-0.5
        to_value = torch.randn(q_heads, mla.value_dim, mla.kv_lora_rank) * mla.kv_lora_rank**-0.5
        return AttentionLayer(0, latent=LatentSpace(mla, to_key, to_value))


HEAD_SHAPES = (
    HeadShape.of("GQA 8/2 x 64", 8, 2, 64),
    HeadShape.of("MQA 8/1 x 128", 8, 1, 128),
    HeadShape.of("MLA 8 x 256+32", 8, 1, 288, MLAConfig(None, 256, 64, 32, 64)),
)


@dataclass(frozen=True)
class ScheduleCell:
    """One situation in one layout."""

    # the model's heads
    heads: HeadShape
    # tensor parallel size
    tp: int
    # prefill context parallel size
    pcp: int
    # decode context parallel size
    dcp: int
    # tokens that the step computes
    new: int
    # tokens that are stored before it
    cached: int

    @property
    def grid(self) -> Grid:
        """The ranks of the layout."""
        return Grid(ParallelConfig(self.tp, self.pcp, self.dcp))

    @property
    def situation(self) -> Situation:
        """The step that is measured."""
        return Situation(self.grid, self.new, self.cached)

    def model(self, constants: CostConstants) -> CostModel:
        """The cost model with which the engine would choose a schedule."""
        grid = self.grid
        shape = attention_shape(grid, self.heads.model, self.layout, _ELEMENT_BYTES)
        group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)))
        return CostModel(shape, group, SCHEDULES, constants, WORKSPACE_TOKENS)

    @property
    def layout(self) -> KVLayout:
        """The layout of a cached token."""
        return cache_layout(self.grid, self.heads.model, _ELEMENT_BYTES)

    def sharding(self, rank: int) -> Sharding:
        """The heads that a rank holds."""
        return Sharding(self.grid, rank, self.heads.model.num_q_heads, self.heads.model.num_kv_heads)

    def q_heads(self, rank: int) -> int:
        """Number of query heads of a rank."""
        start, stop = self.sharding(rank).q_extent
        return stop - start

    def kv_heads(self, rank: int) -> int:
        """Number of KV heads of a rank."""
        start, stop = self.sharding(rank).kv_extent
        return stop - start


@dataclass(frozen=True)
class ScheduleTiming:
    """The result of one schedule in one cell."""

    # its name
    schedule: str
    # measured time of one layer
    seconds: float
    # the cost model's seconds for one layer
    estimated: float
    # bytes sent by all ranks, as counted
    bytes: int
    # bytes sent by all ranks, by the schedule's formula
    formula_bytes: int


@dataclass(frozen=True)
class CellResult:
    """The results of all schedules in one cell."""

    # what was measured
    cell: ScheduleCell
    # one for each schedule that sends anything
    timings: tuple[ScheduleTiming, ...]
    # the schedule that the cost model chooses
    chosen: str
    # the cost model's constants, measured on these ranks and used for the choice
    constants: CostConstants

    @property
    def best(self) -> ScheduleTiming:
        """The fastest schedule."""
        return min(self.timings, key=lambda timing: timing.seconds)

    @property
    def regret(self) -> float:
        """Extra time of the chosen schedule, relative to the fastest."""
        chosen = next(timing for timing in self.timings if timing.schedule == self.chosen)
        return chosen.seconds / self.best.seconds - 1


@dataclass(frozen=True)
class _Measured:
    """The measurements of one rank."""

    # the cost model's constants
    constants: CostConstants
    # for each cell: by schedule the (start, end) of each repetition, and by schedule the bytes sent in one
    spans: tuple[tuple[dict[str, list[tuple[float, float]]], dict[str, int]], ...]


@dataclass(frozen=True)
class MeasureCells:
    """The function that every rank runs."""

    # cells to measure, all of the same layout and head shape
    cells: tuple[ScheduleCell, ...]
    # repetitions that are counted
    iterations: int

    def __call__(self, rank: int, make_group: MakeGroup, traffic: Traffic) -> _Measured:
        """Measure the cost model's constants, then time every schedule in every cell."""
        first = self.cells[0]
        group = make_group(first.grid.context_group(rank))
        everyone = make_group(tuple(range(first.grid.world_size)))
        shape = first.model(CostConstants()).shape
        ops = _ops(first, rank)
        grid = first.grid
        context = ContextGroup(group, grid.shards_of_pcp, grid.nodes(grid.context_group(rank)), WORKSPACE_TOKENS)
        place = Place(grid.ranks[rank].pcp, grid.ranks[rank].shard, grid.shards_of_pcp)
        constants = Calibration(ops, context, place, shape, _COMPARED, torch.float32).measure()
        spans = tuple(_measure(cell, rank, ops, group, everyone, traffic, self.iterations) for cell in self.cells)
        return _Measured(constants, spans)


def run_attention(
    executor: str, cells: Sequence[ScheduleCell], iterations: int, on_progress: Callable[[str], None]
) -> list[CellResult]:
    """Measure all cells. Cells of the same layout and head shape share ranks and constants."""
    results: list[CellResult] = []
    alike: dict[tuple[HeadShape, int, int, int], list[ScheduleCell]] = {}
    for cell in cells:
        alike.setdefault((cell.heads, cell.tp, cell.pcp, cell.dcp), []).append(cell)
    for (heads, tp, pcp, dcp), members in alike.items():
        on_progress(f"{heads.name}, tp {tp} pcp {pcp} dcp {dcp}")
        measured = run_on_ranks(executor, tp * pcp, MeasureCells(tuple(members), iterations))
        results += _results(members, measured)
    return results


def _results(cells: Sequence[ScheduleCell], measured: Sequence[_Measured]) -> list[CellResult]:
    constants = combine([one.constants for one in measured])
    results: list[CellResult] = []
    for number, cell in enumerate(cells):
        expected = {e.schedule: e for e in estimates(cell.situation, cell.model(constants))[0]}
        groups = cell.grid.head_shards  # the formula gives the bytes of one context group
        timings = tuple(
            ScheduleTiming(
                schedule,
                _elapsed([one.spans[number][0][schedule] for one in measured]),
                expected[schedule].seconds,
                sum(one.spans[number][1][schedule] for one in measured),
                expected[schedule].bytes * groups,
            )
            for schedule in _MEASURED
        )
        chosen = min(expected.values(), key=lambda e: e.seconds).schedule
        results.append(CellResult(cell, timings, chosen, constants))
    return results


def _elapsed(ranks: Sequence[list[tuple[float, float]]]) -> float:
    """Median over repetitions of the time from the first rank's start to the last rank's end."""
    repetitions = zip(*ranks, strict=True)
    return float(median(max(end for _, end in r) - min(start for start, _ in r) for r in repetitions))


def _ops(cell: ScheduleCell, rank: int) -> AttentionOps:
    model, shape = cell.heads.model, cell.model(CostConstants()).shape
    heads = Heads.of(cell.sharding(rank))
    return AttentionOps(CpuBackend(), heads, model.attention_scale, model.cached_value_dim, shape.expansion)


def _measure(
    cell: ScheduleCell,
    rank: int,
    ops: AttentionOps,
    group: Collectives,
    everyone: Collectives,
    traffic: Traffic,
    count: int,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, int]]:
    laid_out = lay_out(cell.situation, cell.model(CostConstants()))
    layer = cell.heads.layer(cell.q_heads(rank))
    run, q, k, v = _prepare(cell, rank, ops, group, laid_out)
    spans: dict[str, list[tuple[float, float]]] = {schedule: [] for schedule in _MEASURED}
    sent: dict[str, int] = {}
    for _ in range(count + 1):  # the first repetition is a warm-up
        for schedule in _MEASURED:
            attend = run[schedule]
            before = traffic.bytes_by_label.get(schedule, 0)
            everyone.all_gather(torch.zeros(1), [1] * everyone.size, "barrier")  # ranks start together
            started = now()
            attend(layer, q, k, v)
            spans[schedule].append((started, now()))
            sent[schedule] = traffic.bytes_by_label.get(schedule, 0) - before
    return {schedule: found[1:] for schedule, found in spans.items()}, sent


def _prepare(
    cell: ScheduleCell, rank: int, ops: AttentionOps, group: Collectives, laid_out: LaidOut
) -> tuple[dict[str, Attention], Tensor, Tensor, Tensor]:
    """An `Attention` for each schedule, over one pool, and this rank's q [T, Hq, D] and k, v [T, Hkv, D]."""
    grid, heads, at = cell.grid, cell.heads, cell.grid.ranks[rank]
    layout = cell.layout.with_kv_heads(cell.kv_heads(rank))
    pool = KVPool(layout, (0,), cell.situation.pages, cell.situation.page_size, torch.float32)
    pool.layers[0].values.normal_()
    context = ContextGroup(group, grid.shards_of_pcp, grid.nodes(grid.context_group(rank)), WORKSPACE_TOKENS)
    place = Place(at.pcp, at.shard, grid.shards_of_pcp)
    attentions: dict[str, Attention] = {}
    rows = 0
    for schedule in _MEASURED:
        view = rank_view(laid_out.under(schedule), laid_out.mirror.requests, place, (None,), _MOVES)
        attentions[schedule] = Attention(pool, ops, context, (None,))
        attentions[schedule].begin(attentions[schedule].preparer.step(view))
        rows = len(view.positions)
    q = torch.randn(rows, cell.q_heads(rank), heads.query_dim)
    k, v = (torch.randn(rows, cell.kv_heads(rank), layout.head_dim) for _ in range(2))
    return attentions, q, k, v
