"""A world of ranks that do nothing but attention, as threads of this process.

Queries, keys and values at a position are random tensors seeded by a hash of the request's tokens up to it, prompt and
output, as a model's depend on them. Requests that begin alike have equal rows there, so they may share pages, and no
two others have. So every step of the real scheduler can be checked against dense causal attention over the whole
request, and reading a page of another request, or of other positions, shows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b

import torch
from torch import Tensor

from longspan.attention.attend import Attention
from longspan.attention.backends.base import Backend
from longspan.attention.backends.dense import TorchBackend
from longspan.attention.cost import CostModel, ScheduleChooser
from longspan.attention.layer import AttentionLayer
from longspan.attention.pool import KVPool
from longspan.attention.rows import CacheRows, through
from longspan.attention.schedules import SCHEDULES, ContextGroup
from longspan.attention.variants import AttentionOps, Heads
from longspan.attention.workload import AttentionShape, ExpansionCost, GroupShape
from longspan.cache.layout import KVLayout
from longspan.cache.manager import CacheManager
from longspan.cache.prefix import root_key
from longspan.config import ParallelConfig, SchedulerConfig
from longspan.parallel.collectives import Traffic
from longspan.parallel.grid import Grid
from longspan.parallel.sharding import Sharding, max_kv_heads
from longspan.parallel.threaded import ThreadedCollectives, ThreadFabric
from longspan.plan.mirror import Mirror
from longspan.plan.plan import StepPlan, all_travel
from longspan.plan.reach import Place
from longspan.plan.result import StepResult
from longspan.plan.view import rank_view
from longspan.request import CoreRequest, SampledToken, SamplingParams
from longspan.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Layout:
    """Sizes of one world."""

    tp: int = 1
    pcp: int = 1
    dcp: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    page_size: int = 4
    pages: int | tuple[int, ...] = 64
    budget: int = 32
    local_context: int = 0
    schedule: str = "auto"
    workspace_tokens: int = 1 << 20
    windows: tuple[int | None, ...] = (None,)
    ranks_per_node: int | None = None
    cache_dtype: torch.dtype | None = None  # of a quantised cache
    through_shards: bool = False  # all rows travel, and read their own tokens on the shards that store them


@dataclass(frozen=True, eq=False)
class _Prefix:
    """A request's tokens up to one position: equal tokens are the same object."""

    before: _Prefix | None  # what the tokens before it are; None at the first position
    token: int
    seed: int  # a hash of all its tokens

    def last(self, count: int | None) -> list[_Prefix]:
        """The prefixes that end at its last `count` positions (None: at all), in position order."""
        found: list[_Prefix] = []
        at: _Prefix | None = self
        while at is not None and (count is None or len(found) < count):
            found.append(at)
            at = at.before
        return found[::-1]


@cache
def _prefix(before: _Prefix | None, token: int) -> _Prefix:
    parent = b"" if before is None else before.seed.to_bytes(7)
    return _Prefix(before, token, int.from_bytes(blake2b(parent + token.to_bytes(4), digest_size=7).digest()))


@dataclass
class World:
    """Scheduler, ranks and the dense answer."""

    layout: Layout
    backend: Backend = field(default_factory=lambda: TorchBackend(torch.device("cpu")))
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __post_init__(self) -> None:
        at = self.layout
        self.grid = Grid(ParallelConfig(at.tp, at.pcp, at.dcp, ranks_per_node=at.ranks_per_node))
        shards = self.grid.num_shards
        pages = (at.pages,) * shards if isinstance(at.pages, int) else at.pages
        self.cache = CacheManager(at.page_size, pages, enable_prefix_caching=True)
        kv_heads = max_kv_heads(self.grid, at.q_heads, at.kv_heads)
        shape = AttentionShape(at.q_heads // at.tp, kv_heads, at.head_dim, self.dtype.itemsize)
        maps = SCHEDULES.get(at.schedule, SCHEDULES["local"]).moves == "signals"
        group = GroupShape(self.grid.shards_of_pcp, self.grid.nodes(self.grid.context_group(0)), maps_pools=maps)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=at.budget, max_num_seqs=min(at.budget, 64), local_context=at.local_context,
                schedule=at.schedule,
            ),
            self.cache, self.grid, ScheduleChooser(CostModel(shape, group, SCHEDULES), at.schedule), root_key("test"),
            at.windows,
        )  # fmt: skip
        self._fabric = fabric = ThreadFabric(self.grid.world_size)
        self.traffic = [Traffic() for _ in range(self.grid.world_size)]
        self.shardings = [Sharding(self.grid, rank, at.q_heads, at.kv_heads) for rank in range(self.grid.world_size)]
        self.attentions = [self._attention(rank, fabric, pages) for rank in range(self.grid.world_size)]
        if maps:
            with self._threads() as threads:
                list(threads.map(Attention.map_peers, self.attentions))
        self.mirrors = [Mirror(at.page_size, shards) for _ in range(self.grid.world_size)]
        self.plans: list[StepPlan] = []
        self.left: dict[str, int] = {}  # tokens that a request still wants
        self.prefixes: dict[str, list[_Prefix]] = {}  # of every request, at every position with a known token
        self.worst_error = 0.0

    def _attention(self, rank: int, fabric: ThreadFabric, pages: tuple[int, ...]) -> Attention:
        at, sharding = self.layout, self.shardings[rank]
        start, stop = sharding.kv_extent
        pool = KVPool(
            KVLayout(1, stop - start, at.head_dim, 8, scale_groups=(at.head_dim,) if at.cache_dtype else ()),
            range(len(at.windows)),
            pages[self.grid.ranks[rank].shard],
            at.page_size,
            at.cache_dtype or self.dtype,
        )
        for rows in pool.layers.values():
            (rows.values if rows.scales is None else rows.scales).fill_(
                float("nan")
            )  # whatever is read before it is written shows
        members = self.grid.context_group(rank)
        group = ThreadedCollectives(fabric, self.grid.context_group(rank), rank, self.traffic[rank])
        ops = AttentionOps(self.backend, Heads.of(sharding), at.head_dim**-0.5, at.head_dim, ExpansionCost())
        return Attention(
            pool,
            ops,
            ContextGroup(group, self.grid.shards_of_pcp, self.grid.nodes(members), at.workspace_tokens),
            at.windows,
        )

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.grid.world_size, initializer=torch.set_num_threads, initargs=(1,))

    def add(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """Queue a request whose q, k, v at each position depend on the tokens up to it."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        self.scheduler.add(CoreRequest(request_id, prompt, params, 0, max_tokens))
        self.left[request_id] = max_tokens
        self.prefixes[request_id] = []
        for token in prompt:
            self._known(request_id, token)

    def _known(self, request_id: str, token: int) -> None:
        so_far = self.prefixes[request_id]
        so_far.append(_prefix(so_far[-1] if so_far else None, token))

    @property
    def moved(self) -> set[str]:
        """The schedules under which a rank has sent bytes to another."""
        return {label for traffic in self.traffic for label, sent in traffic.bytes_by_label.items() if sent}

    @property
    def planned(self) -> set[str]:
        """The schedules of all plans."""
        return {name for plan in self.plans for name in (*plan.decode_schedules, *plan.prefill_schedules)}

    def run(self, steps: int = 1 << 30) -> None:
        """Step until everything is finished, checking every row of every step."""
        with self._threads() as pool:
            while len(self.plans) < steps and (plan := self.scheduler.schedule()) is not None:
                self.plans.append(plan)
                list(pool.map(lambda rank: self._step(rank, plan), range(self.grid.world_size)))
                ends = [segment for segment in plan.segments if segment.sample]
                sampled = tuple(SampledToken(s.request_id, (s.stop * 7 + int(s.request_id)) % 5) for s in ends)
                self.scheduler.commit(plan, StepResult(sampled))
                for token in sampled:
                    self._known(token.request_id, token.token_id)
                    self.left[token.request_id] -= 1
                    if not self.left[token.request_id]:
                        self.scheduler.finish(token.request_id)
                self.scheduler.check_integrity()

    def _step(self, rank: int, plan: StepPlan) -> None:
        try:
            self._compute(rank, plan)
        except BaseException:
            self._fabric.abort()  # or the other ranks would wait for this one for ever
            raise

    def _compute(self, rank: int, plan: StepPlan) -> None:
        place, mirror = self.grid.ranks[rank], self.mirrors[rank]
        mirror.apply(plan)
        attention = self.attentions[rank]
        where = Place(place.pcp, place.shard, self.grid.shards_of_pcp, attention.pool.first_slots)
        at = self.layout
        if at.through_shards:
            plan = all_travel(plan, at.schedule)
        view = rank_view(
            plan, mirror.requests, where, at.windows, attention.moves, attention.causal_runs, at.through_shards
        )
        attention.begin(attention.preparer.step(view))
        rows = self._rows(plan, place.pcp)
        assert view.positions == tuple(position for _, position in rows)
        prefixes = [self.prefixes[request_id][position] for request_id, position in rows]
        assert view.token_ids == tuple(prefix.token for prefix in prefixes)
        q, k, v = self._gather(prefixes, self.shardings[rank])
        for index, window in enumerate(self.layout.windows):
            out = attention(AttentionLayer(index, window), q, k, v)
            self._check(prefixes, self.shardings[rank], out, window)

    def _rows(self, plan: StepPlan, pcp: int) -> list[tuple[str, int]]:
        """(request, position) of a rank's rows: decode before prefill, local before travelling."""
        mine = [s for s in plan.segments if s.pcp == pcp]
        mine.sort(key=lambda s: (s.prefill, s.num_remote_groups))
        return [(s.request_id, position) for s in mine for position in range(s.start, s.stop)]

    def _gather(self, rows: list[_Prefix], sharding: Sharding) -> tuple[Tensor, Tensor, Tensor]:
        at = self.layout
        of_rows = [_qkv(*self._tensors, row) for row in rows]
        found: list[Tensor] = []
        for part, (start, stop) in enumerate((sharding.q_extent, sharding.kv_extent, sharding.kv_extent)):
            if rows:
                found.append(torch.stack([tensors[part] for tensors in of_rows])[:, start:stop].contiguous())
            else:
                found.append(torch.empty(0, stop - start, at.head_dim, dtype=self.dtype))
        return found[0], found[1], found[2]

    def _check(self, rows: list[_Prefix], sharding: Sharding, out: Tensor, window: int | None) -> None:
        if not rows:
            return
        dense = torch.stack([_dense(*self._tensors, row, window, self.layout.cache_dtype) for row in rows])
        error = (out - dense[:, slice(*sharding.q_extent)]).abs().max().item()
        assert error == error, f"NaN in one of {len(rows)} rows"
        self.worst_error = max(self.worst_error, error)

    @property
    def _tensors(self) -> tuple[int, int, int, int, torch.dtype]:
        at = self.layout
        return self.seed, at.q_heads, at.kv_heads, at.head_dim, self.dtype


@cache
def _qkv(
    seed: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, prefix: _Prefix
) -> tuple[Tensor, Tensor, Tensor]:
    """q [Hq, D], k and v [Hkv, D] of the last token of a prefix."""
    generator = torch.Generator().manual_seed(seed ^ prefix.seed)
    q, k, v = (torch.randn(n, head_dim, dtype=dtype, generator=generator) for n in (q_heads, kv_heads, kv_heads))
    return q, k, v


@cache
def _dense(
    seed: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    prefix: _Prefix,
    window: int | None,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """Dense attention [Hq, D] of the last token of a prefix over all it sees, as the cache keeps it."""
    tensors = (seed, q_heads, kv_heads, head_dim, dtype)
    seen = prefix.last(window)
    keys, values = (
        torch.stack([_qkv(*tensors, p)[part] for p in seen]).repeat_interleave(q_heads // kv_heads, dim=1)
        for part in (1, 2)
    )
    if cache_dtype is not None:
        like = CacheRows(keys.to(cache_dtype), keys, (head_dim,))
        keys, values = through(keys, like), through(values, like)
    weights = torch.softmax(torch.einsum("hd,phd->hp", _qkv(*tensors, prefix)[0], keys) * head_dim**-0.5, -1)
    return torch.einsum("hp,phd->hd", weights, values)
