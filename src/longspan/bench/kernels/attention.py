"""Benchmarks of attention kernels: decode, off-diagonal prefill, and one context over several shards.

It owns the cases and the least bytes and operations that they need; it must not know how a backend works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
    """The heads of a model, as attention sees them."""

    # name in tables
    name: str
    # query heads
    q_heads: int
    # KV heads
    kv_heads: int
    # elements of a cached row
    head_dim: int
    # those of them that are values
    value_dim: int
    # 2 for keys and values, 1 for latents
    kv_factor: int

    @property
    def blocks(self) -> tuple[HeadBlock, ...]:
        """All heads as one block."""
        return (HeadBlock(0, self.q_heads, 0, self.kv_heads),)

    @property
    def groups(self) -> tuple[int, ...]:
        """Elements of a row in each scale group, where rows are quantised."""
        rest = self.head_dim - self.value_dim
        return (self.value_dim, rest) if self.kv_factor == 1 and rest else (self.head_dim,)

    def shape(self, harness: Harness, quantised: bool) -> BackendShape:
        """The shape that a backend must support."""
        return BackendShape(self.head_dim, self.value_dim, self.kv_factor, quantised, harness.dtype)


HEADS = {
    heads.name: heads
    for heads in (
        KernelHeads("gqa", 64, 8, 128, 128, 2),
        KernelHeads("mla", 128, 1, 576, 512, 1),
        KernelHeads("mla16", 16, 1, 576, 512, 1),
        KernelHeads("mha", 16, 16, 128, 128, 2),
    )
}


@dataclass(frozen=True)
class AttentionCase:
    """One case: a batch of requests that attend to their cached tokens."""

    # the model's heads
    heads: KernelHeads
    # of the cache, one of `FORMATS`
    format: str
    # number of requests
    batch: int
    # query tokens of each request
    new: int
    # cached tokens of each request
    cached: int

    @property
    def rows(self) -> int:
        """Query tokens of all requests."""
        return self.batch * self.new

    def row_bytes(self, harness: Harness) -> int:
        """Bytes of one cached token, including scales."""
        quantised = FORMATS[self.format] is not None
        size = 1 if quantised else harness.dtype.itemsize
        scales = 4 * len(self.heads.groups) if quantised else 0
        return self.heads.kv_factor * self.heads.kv_heads * (self.heads.head_dim * size + scales)

    def size(self, harness: Harness) -> tuple[int, int]:
        """The least bytes that have to be moved, and the floating-point operations."""
        heads = self.heads
        queries = heads.head_dim * harness.dtype.itemsize + (heads.value_dim + 1) * 4  # q in, out and lse out
        moved = self.batch * self.cached * self.row_bytes(harness) + self.rows * heads.q_heads * queries
        return moved, 2 * self.rows * self.cached * heads.q_heads * (heads.head_dim + heads.value_dim)

    def case(self, what: str) -> dict[str, str | int]:
        """The columns that identify the case in a table; `what` is the kernel."""
        return {
            "kernel": what, "heads": self.heads.name, "format": self.format,
            "batch": self.batch, "new": self.new, "cached": self.cached,
        }  # fmt: skip

    def runs(self) -> tuple[QueryRun, ...]:
        """One run for each request, over its own range of the cache."""
        return tuple(
            QueryRun(number * self.new, self.new, (Span(number * self.cached, self.cached),))
            for number in range(self.batch)
        )

    def tensors(self, harness: Harness) -> tuple[Tensor, CacheRows]:
        """Random queries q [T, Hq, D] and a random cache [kv_factor, Hkv, S, D]."""
        q = torch.randn(self.rows, self.heads.q_heads, self.heads.head_dim, device=harness.device, dtype=harness.dtype)
        shape = (self.heads.kv_factor, self.heads.kv_heads, self.batch * self.cached, self.heads.head_dim)
        stored = FORMATS[self.format]
        if stored is None:
            return q, CacheRows(torch.randn(shape, device=harness.device, dtype=harness.dtype))
        values = torch.empty(shape, dtype=stored, device=harness.device)
        for plane in values.flatten(0, 1):  # one head at a time, as random numbers take more memory
            plane.copy_(torch.randn(plane.shape, device=harness.device, dtype=harness.dtype).mul_(30).to(stored))
        scales = torch.rand(*shape[:3], len(self.heads.groups), device=harness.device) / 30
        return q, CacheRows(values, scales, self.heads.groups)


def run_scenes(harness: Harness, what: str, scenes: Iterable[AttentionCase]) -> list[KernelRow]:
    """Time every backend on every scene. A scene that does not fit the memory gives one row that says so."""
    found: list[KernelRow] = []
    for scene in scenes:
        lacking = harness.lacks(scene.batch * scene.cached * scene.row_bytes(harness))
        if lacking:
            found.append(KernelRow(scene.case(what), "-", *scene.size(harness), None, lacking))
            continue
        q, cache = scene.tensors(harness)
        runs = scene.runs()
        for name, backend in harness.contestants(scene.heads.shape(harness, cache.scales is not None)).items():
            work = _attend(backend, q, runs, cache, scene)
            row = harness.measure(scene.case(what), name, scene.size(harness), work)
            found.append(replace(row, command=_command(harness, scene, what, name)))
        del q, cache
    return found


def _command(harness: Harness, scene: AttentionCase, what: str, backend: str) -> str:
    """What repeats a case of decode or prefill."""
    sizes = f'--batch {scene.batch} --cached {scene.cached} --prefill ""'
    if what == "prefill":
        sizes = f'--batch "" --prefill {scene.new}x{scene.cached}'
    return (
        f"longspan bench attention --device {harness.device.type} --heads {scene.heads.name} "
        f"--kv-cache-dtype {scene.format} --backends {backend} {sizes} --shared-context 0"
    )


def _attend(
    backend: Backend, q: Tensor, runs: tuple[QueryRun, ...], cache: CacheRows, scene: AttentionCase
) -> Callable[[], AttentionState]:
    prepared = backend.prepare(runs, len(q))
    return lambda: prepared.attend(q, cache, scene.heads.blocks, _SCALE)


@dataclass(frozen=True)
class Shared:
    """Seconds of attention to one context, on one device and divided over shards."""

    # the whole context
    whole: float
    # each shard's part of it
    shards: tuple[float, ...]
    # merging the shards' states
    merge: float

    @property
    def slowest_share(self) -> float:
        """Seconds of the slowest shard over those of the whole context: 1 / shards at best."""
        return max(self.shards) / self.whole

    @property
    def merge_share(self) -> float:
        """Seconds of the merge over those of the whole context."""
        return self.merge / self.whole


def run_shards(harness: Harness, scene: AttentionCase, shards: int) -> tuple[list[KernelRow], dict[str, Shared]]:
    """Time a scene of one request whole, each of its `shards` parts one after another on this device, and the merge."""
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
            part = AttentionCase(scene.heads, scene.format, 1, scene.new, span.length)
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


def _merge_row(
    harness: Harness, name: str, backend: Backend, parts: list[AttentionState], scene: AttentionCase
) -> KernelRow:
    travelled = [torch.cat([part.out, part.lse[..., None]], dim=-1) for part in parts]
    arrived = [AttentionState(packed[..., :-1], packed[..., -1]) for packed in travelled]
    moved = 4 * travelled[0].numel() * (len(parts) + 1)
    return harness.measure(scene.case("merge"), name, (moved, 0), lambda: backend.merge(arrived))


def _shared(times: list[Timing]) -> Shared:
    whole, *shards, merge = (time.median for time in times)
    return Shared(whole, tuple(shards), merge)
