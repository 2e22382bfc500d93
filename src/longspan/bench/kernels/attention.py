"""Attention kernels: decode over cached rows, long prefill off the diagonal, and one context over several shards.

It owns the cases and what they must move and compute at least; it must not know how a backend works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longspan.attention.backends.base import Backend, BackendShape
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.bench.kernels.harness import Harness, KernelRow
from longspan.cache.pages import Span
from longspan.clock import Timing
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun

FORMATS = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_SCALE = 0.05


@dataclass(frozen=True)
class KernelHeads:
    """A model's heads: query and KV heads, elements of a row, of which `value_dim` are values, planes of a cache."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    kv_factor: int

    @property
    def blocks(self) -> tuple[HeadBlock, ...]:
        """All of them in one block."""
        return (HeadBlock(0, self.q_heads, 0, self.kv_heads),)

    @property
    def groups(self) -> tuple[int, ...]:
        """What shares a scale where rows are quantised."""
        rest = self.head_dim - self.value_dim
        return (self.value_dim, rest) if self.kv_factor == 1 and rest else (self.head_dim,)

    def shape(self, harness: Harness, quantised: bool) -> BackendShape:
        """For the choice of backends."""
        return BackendShape(self.head_dim, self.value_dim, self.kv_factor, quantised, harness.dtype)


HEADS = {
    heads.name: heads
    for heads in (
        KernelHeads("gqa", 64, 8, 128, 128, 2),
        KernelHeads("mla", 128, 1, 576, 512, 1),
        KernelHeads("mha", 16, 16, 128, 128, 2),
    )
}


@dataclass(frozen=True)
class Scene:
    """`batch` requests with `new` query tokens each, over `cached` tokens of their own in a cache of some format."""

    heads: KernelHeads
    format: str
    batch: int
    new: int
    cached: int

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.batch * self.new

    def row_bytes(self, harness: Harness) -> int:
        """One cached token's."""
        quantised = FORMATS[self.format] is not None
        size = 1 if quantised else harness.dtype.itemsize
        scales = 4 * len(self.heads.groups) if quantised else 0
        return self.heads.kv_factor * self.heads.kv_heads * (self.heads.head_dim * size + scales)

    def size(self, harness: Harness) -> tuple[int, int]:
        """Bytes that must move and operations that must be done."""
        heads = self.heads
        queries = heads.head_dim * harness.dtype.itemsize + (heads.value_dim + 1) * 4  # q in, out and lse out
        moved = self.batch * self.cached * self.row_bytes(harness) + self.rows * heads.q_heads * queries
        return moved, 2 * self.rows * self.cached * heads.q_heads * (heads.head_dim + heads.value_dim)

    def case(self, what: str) -> dict[str, str | int]:
        """Its name in a table."""
        return {
            "kernel": what, "heads": self.heads.name, "format": self.format,
            "batch": self.batch, "new": self.new, "cached": self.cached,
        }  # fmt: skip

    def runs(self) -> tuple[QueryRun, ...]:
        """Each request over its part of the cache."""
        return tuple(
            QueryRun(number * self.new, self.new, (Span(number * self.cached, self.cached),))
            for number in range(self.batch)
        )

    def tensors(self, harness: Harness) -> tuple[Tensor, CacheRows]:
        """Random queries and a random cache."""
        q = torch.randn(self.rows, self.heads.q_heads, self.heads.head_dim, device=harness.device, dtype=harness.dtype)
        shape = (self.heads.kv_factor, self.heads.kv_heads, self.batch * self.cached, self.heads.head_dim)
        stored = FORMATS[self.format]
        if stored is None:
            return q, CacheRows(torch.randn(shape, device=harness.device, dtype=harness.dtype))
        values = torch.empty(shape, dtype=stored, device=harness.device)
        for plane in values.flatten(0, 1):  # a head at a time: what is random is larger than what is stored
            plane.copy_(torch.randn(plane.shape, device=harness.device, dtype=harness.dtype).mul_(30).to(stored))
        scales = torch.rand(*shape[:3], len(self.heads.groups), device=harness.device) / 30
        return q, CacheRows(values, scales, self.heads.groups)


def run_scenes(harness: Harness, what: str, scenes: Iterable[Scene]) -> list[KernelRow]:
    """Every backend on every scene."""
    found: list[KernelRow] = []
    for scene in scenes:
        lacking = harness.lacks(scene.batch * scene.cached * scene.row_bytes(harness))
        if lacking:
            found.append(KernelRow(scene.case(what), "-", *scene.size(harness), None, lacking))
            continue
        q, cache = scene.tensors(harness)
        runs = scene.runs()
        for name, backend in harness.contestants(scene.heads.shape(harness, cache.scales is not None)).items():
            found.append(
                harness.measure(scene.case(what), name, scene.size(harness), _attend(backend, q, runs, cache, scene))
            )
        del q, cache
    return found


def _attend(
    backend: Backend, q: Tensor, runs: tuple[QueryRun, ...], cache: CacheRows, scene: Scene
) -> Callable[[], AttentionState]:
    prepared = backend.prepare(runs, len(q))
    return lambda: prepared.attend(q, cache, scene.heads.blocks, _SCALE)


@dataclass(frozen=True)
class Shared:
    """One context whole, and cut over shards: seconds of the whole, of each shard, of merging the shards' results."""

    whole: float
    shards: tuple[float, ...]
    merge: float

    @property
    def slowest_share(self) -> float:
        """The slowest shard's part of the whole's time: 1 / shards at best."""
        return max(self.shards) / self.whole

    @property
    def merge_share(self) -> float:
        """The merge's part of the whole's time."""
        return self.merge / self.whole


def run_shards(harness: Harness, scene: Scene, shards: int) -> tuple[list[KernelRow], dict[str, Shared]]:
    """A scene of one request on `shards` virtual ranks, one after the other on this device, and the merge."""
    lacking = harness.lacks(scene.cached * scene.row_bytes(harness))
    if lacking:
        return [KernelRow(scene.case("whole"), "-", *scene.size(harness), None, lacking)], {}
    q, cache = scene.tensors(harness)
    bounds = [scene.cached * number // shards for number in range(shards + 1)]
    spans = [Span(start, stop - start) for start, stop in pairwise(bounds)]
    found: list[KernelRow] = []
    shared: dict[str, Shared] = {}
    for name, backend in harness.contestants(scene.heads.shape(harness, cache.scales is not None)).items():
        rows = [
            harness.measure(
                scene.case("whole"), name, scene.size(harness), _attend(backend, q, scene.runs(), cache, scene)
            )
        ]
        parts: list[AttentionState] = []
        for number, span in enumerate(spans):
            runs = (QueryRun(0, scene.new, (span,)),)
            part = Scene(scene.heads, scene.format, 1, scene.new, span.length)
            case = {**part.case("shard"), "shard": number}
            rows.append(harness.measure(case, name, part.size(harness), _attend(backend, q, runs, cache, scene)))
            if rows[-1].timing is not None:
                parts.append(backend.attend(q, runs, cache, scene.heads.blocks, _SCALE).columns(scene.heads.value_dim))
        if len(parts) == shards:
            rows.append(_merge_row(harness, name, backend, parts, scene))
        found += rows
        times = [row.timing for row in rows]
        if len(rows) == shards + 2 and all(times):
            shared[name] = _shared([time for time in times if time is not None])
    return found, shared


def _merge_row(harness: Harness, name: str, backend: Backend, parts: list[AttentionState], scene: Scene) -> KernelRow:
    travelled = [torch.cat([part.out, part.lse[..., None]], dim=-1) for part in parts]
    arrived = [AttentionState(packed[..., :-1], packed[..., -1]) for packed in travelled]
    moved = 4 * travelled[0].numel() * (len(parts) + 1)
    return harness.measure(scene.case("merge"), name, (moved, 0), lambda: backend.merge(arrived))


def _shared(times: list[Timing]) -> Shared:
    whole, *shards, merge = (time.median for time in times)
    return Shared(whole, tuple(shards), merge)
