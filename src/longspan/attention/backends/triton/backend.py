"""Attention on a GPU with kernels written in Triton.

It owns the launches: their tensors, strides and configurations; it must not know about ranks or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.backends.base import RecordableBackend
from longspan.attention.backends.triton.attend import LOG2_E, attend_kernel
from longspan.attention.backends.triton.columns import ColumnTable
from longspan.attention.backends.triton.config import (
    FUSED,
    PARTS,
    Chip,
    Config,
    Shape,
    config_for,
    rows_at_once,
    shape_of,
)
from longspan.attention.backends.triton.hopper import problem_of_latent_kernel
from longspan.attention.backends.triton.merge import merge_parts
from longspan.attention.backends.triton.plan import ITEM_FIELDS, SPLIT_FIELDS, Plans, RefillablePlans, WorkPlan
from longspan.attention.backends.triton.reduce import reduce_kernel
from longspan.attention.backends.triton.work import Tiling
from longspan.attention.backends.triton.write import TritonSlotWriter, TritonWriter
from longspan.attention.rows import CacheRows, unit_stride
from longspan.attention.state import AttentionState
from longspan.attention.step_buffer import StepBuffer
from longspan.early_launch import early_options
from longspan.parallel.heads import HeadBlock
from longspan.plan.reach import QueryRun
from longspan.plan.view import WriteRun

_INDEX_SLOTS = 65536  # slots for which the index of decode rows has room besides those of the pool
_SHARERS = 16  # contexts, on average, that share a slot of the pool: many share a system prompt
_LEAST_SHARERS = 4  # the same where more would take over a quarter of a gigabyte
_MOST_INDEXED = 1 << 26  # entries of the index, of 4 bytes, for more sharers than these
_INTERPRETED_PROCESSORS = 4  # used with Triton's interpreter, which has no device


@dataclass(frozen=True)
class _Keys:
    """What one launch reads: rows of a cache, or of new tokens. Only the last dimension must have stride 1."""

    # [Hkv, S, D]
    keys: Tensor
    # [Hkv, S, Dv], or the keys if a value is the first elements of its key
    values: Tensor
    # [Hkv, S, G] fp32; any tensor if rows are not quantised
    key_scales: Tensor
    # [Hkv, S, G] fp32; any tensor if rows are not quantised
    value_scales: Tensor
    # the widths
    shape: Shape


class TritonBackend(RecordableBackend):
    """Decode, the off-diagonal of a prefill and the diagonal are one kernel with different work.

    `value_dim` is the number of elements of a value in a cache with `kv_factor` 1. `specialised` says whether many rows
    of latents are computed by `latent.py`, None to decide by the device. To capture a CUDA graph, attend with runs from
    `refillable` once before the capture, which allocates buffers, and once in it. `fill` them before each replay.
    """

    def __init__(
        self,
        device: torch.device,
        value_dim: int,
        processors: int | None = None,
        specialised: bool | None = None,
    ) -> None:
        self._device = device
        if specialised is None:
            specialised = _specialised(device)
        self._launcher = _Launcher(value_dim, processors or _processors(device), _chip(device), specialised)
        self._table: ColumnTable | None = None  # of all refillable runs

    causal_runs = True

    def prepare(self, runs: Sequence[QueryRun], rows: int) -> TritonRuns:
        """See `Backend.prepare`."""
        return TritonRuns(self._launcher, Plans.of_runs(runs, rows, self._device))

    def prepare_diagonal(self, segments: Sequence[tuple[int, int]], rows: int, window: int | None) -> TritonDiagonal:
        """See `Backend.prepare_diagonal`."""
        return TritonDiagonal(self._launcher, Plans.of_diagonal(segments, rows, window, self._device))

    def refillable(self, rows: int, slots: int, buffer: StepBuffer) -> RefillableTritonRuns:
        """See `RecordableBackend.refillable`. The index of slots is shared: only one graph runs at a time.

        It has room for every slot of the pool, and for requests that grow or share pages.
        """
        if self._table is None:
            shared = max(_LEAST_SHARERS * slots, min(_SHARERS * slots, _MOST_INDEXED))
            self._table = ColumnTable(shared + _INDEX_SLOTS, self._device)
        return RefillableTritonRuns(self._launcher, RefillablePlans(rows, 1, 0, self._device, self._table, buffer))

    def indexed(self, rows: int, longest: int = 1, index: int = 0) -> RefillableTritonRuns:
        """Refillable runs of any length with an index of their own; arguments are those of `RefillablePlans`."""
        return RefillableTritonRuns(self._launcher, RefillablePlans(rows, longest, index, self._device))

    def writer(self, writes: Sequence[WriteRun], rows: int, buffer: StepBuffer | None = None) -> TritonWriter:
        """See `RecordableBackend.writer`."""
        return TritonWriter(writes, rows, self._device, buffer)

    def slot_writer(self, slots: Tensor) -> TritonSlotWriter:
        """See `Backend.slot_writer`."""
        return TritonSlotWriter(slots)

    def merge(self, parts: Sequence[AttentionState], dtype: torch.dtype | None = None) -> AttentionState:
        """See `Backend.merge`."""
        return merge_parts(parts, _stored(dtype))


class TritonRuns:
    """See `PreparedRuns`. With `kv_factor` 1 a result is as wide as the part of a cached row that holds the value."""

    def __init__(self, launcher: _Launcher, plans: Plans) -> None:
        self._launcher = launcher
        self.plans = plans

    def attend(
        self,
        q: Tensor,
        kv: CacheRows,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedRuns.attend`."""
        return self._launcher.attend(q, self._launcher.cached(kv, _wide(q)), blocks, scale, self.plans, dtype)


class RefillableTritonRuns(TritonRuns):
    """See `RefillableRuns`."""

    plans: RefillablePlans

    def __init__(self, launcher: _Launcher, plans: RefillablePlans) -> None:
        super().__init__(launcher, plans)

    def fill(self, runs: Sequence[QueryRun]) -> bool:
        """See `RefillableRuns.fill`."""
        return self.plans.fill(runs)


class TritonDiagonal:
    """See `PreparedDiagonal`."""

    def __init__(self, launcher: _Launcher, plans: Plans) -> None:
        self._launcher = launcher
        self._plans = plans

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Sequence[HeadBlock],
        scale: float,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """See `PreparedDiagonal.attend`."""
        return self._launcher.attend(q, self._launcher.fresh(k, v, _wide(q)), blocks, scale, self._plans, dtype)


@dataclass(frozen=True)
class _Launcher:
    """Launches the kernels on one device."""

    # elements of a value in a cache with `kv_factor` 1
    value_dim: int
    # streaming multiprocessors of the device
    processors: int
    # decides the tiles
    chip: Chip
    # whether `latent.py` may be used
    specialised: bool

    def fresh(self, k: Tensor, v: Tensor | None, wide: bool) -> _Keys:
        """The keys k [T, Hkv, D] and values v [T, Hkv, Dv] of new tokens; `wide` for fp32 queries."""
        keys = _aligned(k).transpose(0, 1)
        values = keys if v is None else _aligned(v).transpose(0, 1)
        shape = shape_of(keys.shape[2], self.value_dim if v is None else values.shape[2], (), v is None, wide)
        return _Keys(keys, values, keys, keys, shape)

    def cached(self, kv: CacheRows, wide: bool) -> _Keys:
        """The rows of a cache; `wide` for fp32 queries."""
        values = unit_stride(kv.values)
        scales = values if kv.scales is None else unit_stride(kv.scales)
        shared = values.shape[0] == 1
        groups = () if kv.scales is None else kv.groups or (kv.width,)
        shape = shape_of(kv.width, self.value_dim if shared else kv.width, groups, shared, wide)
        return _Keys(values[0], values[-1], scales[0], scales[-1], shape)

    def attend(
        self,
        q: Tensor,
        keys: _Keys,
        blocks: Sequence[HeadBlock],
        scale: float,
        plans: Plans,
        dtype: torch.dtype | None,
    ) -> AttentionState:
        """Attention of q [T, Hq, D] to the keys that the work in `plans` names: out [T, Hq, width of a value].

        Raises `ValueError` if q has another number of rows than the plans.
        """
        if len(q) != plans.rows:
            raise ValueError(f"{len(q)} rows for work of {plans.rows}")
        if q.dtype == torch.float64 or not q.is_cuda:  # kernels add in fp32; the interpreter has no bf16
            q = q.float()
        q = _aligned(q)
        tokens, heads, _ = q.shape
        width = keys.shape.value[0] + keys.shape.value[2]
        whole = AttentionState(
            torch.empty((tokens, heads, width), dtype=_stored(dtype), device=q.device),
            torch.empty((tokens, heads), dtype=torch.float32, device=q.device),
        )
        for block in blocks if tokens else ():
            rows = plans.longest * block.group
            config = config_for(keys.shape, rows, self.chip, self.specialised and _suits_latent_kernel(q, keys, block))
            programs = self.processors * config.resident
            tiling = Tiling(block.group, block.kv_heads, config.block_m, config.block_n, programs)
            _launch(q, keys, block, scale, config, plans.plan(tiling), whole, rows)
        return whole


def _launch(
    q: Tensor,
    keys: _Keys,
    block: HeadBlock,
    scale: float,
    config: Config,
    plan: WorkPlan,
    whole: AttentionState,
    rows: int,
) -> None:
    """Compute the heads of one block of `whole`.

    The launches are: the items, and the reduction of rows that several items share, if they do not merge them. `rows`
    is the most packed rows of a run.
    """
    heads, width, room = block.kv_heads, whole.out.shape[2], plan.capacity
    part_out = q.new_empty((room.partials, heads, config.block_m, width), dtype=torch.float32)
    part_lse = q.new_empty((room.partials, heads, config.block_m), dtype=torch.float32)
    if config.specialised:
        # imported where it is used: Gluon is experimental, and only one kind of device needs it
        from longspan.attention.backends.triton.latent_launch import launch_latents

        launch_latents(q, keys.keys[block.kv_start], block, scale * LOG2_E, plan, whole, part_out, part_lse)
    else:
        _launch_any(q, keys, block, scale * LOG2_E, config, plan, whole, part_out, part_lse)
    if room.splits and not config.merges:
        reduce_kernel[(room.splits, heads, min(rows, config.block_m))](
            plan.splits, whole.out, whole.lse, part_out, part_lse, _strides(whole), block.q_start, block.group, heads,
            WIDTH=width, BLOCK_M=config.block_m, PARTS=16, FIELDS=SPLIT_FIELDS, **early_options(q.device), num_warps=4,
            enable_fp_fusion=FUSED,
        )  # fmt: skip


def _launch_any(
    q: Tensor,
    keys: _Keys,
    block: HeadBlock,
    scale: float,
    config: Config,
    plan: WorkPlan,
    whole: AttentionState,
    part_out: Tensor,
    part_lse: Tensor,
) -> None:
    """Compute the items of one block with `attend_kernel`. `scale` is that of scores times log2(e)."""
    shape, heads, room, width = keys.shape, block.kv_heads, plan.capacity, whole.out.shape[2]
    items = room.adjacent + room.gathered
    attend_kernel[(items * heads,) if config.merges else (items, heads)](
        plan.adjacent, plan.gathered, room.adjacent, plan.counts, plan.arrived, plan.bounds, plan.index, q,
        (keys.keys, keys.values, keys.key_scales, keys.value_scales),
        whole.out, whole.lse, part_out, part_lse, q.stride()[:2],
        tuple(x.stride(0) for x in (keys.keys, keys.values, keys.key_scales)), _strides(whole),
        (block.q_start, block.kv_start), block.group, heads, scale,
        KEY=shape.key, VALUE=shape.value, SHARED=shape.shared, GROUPS=shape.groups,
        STRIDES=tuple(x.stride(1) for x in (keys.keys, keys.values, keys.key_scales)), GATHERED=room.gathered > 0,
        FLIP=config.flip, SPLIT=config.split, MERGES=config.merges, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        FIELDS=ITEM_FIELDS, PARTS=PARTS, ROWS=rows_at_once(config, width), **early_options(q.device),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=FUSED,
    )  # fmt: skip


def _suits_latent_kernel(q: Tensor, keys: _Keys, block: HeadBlock) -> bool:
    """Whether `latent.py` can read these tensors: one KV head, and rows that begin at multiples of 16 bytes.

    Of the strides of queries, which are no constants, the compiler knows only whether they are multiples of 16.
    """
    rows = keys.keys[block.kv_start]
    return (
        q.dtype == rows.dtype
        and block.kv_heads == 1
        and q.stride(0) % 16 == q.stride(1) % 16 == 0
        and rows.stride(0) % 8 == 0
        and rows.data_ptr() % 16 == 0
    )


def _strides(whole: AttentionState) -> tuple[int, int, int]:
    """Of out from token to token and from head to head, and of lse from token to token."""
    return whole.out.stride(0), whole.out.stride(1), whole.lse.stride(0)


def _processors(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _chip(device: torch.device) -> Chip:
    """The kind of device that tiles are chosen for."""
    if device.type != "cuda":
        return Chip.LARGE
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the attribute
    return Chip.with_shared(properties.shared_memory_per_block_optin)


def _specialised(device: torch.device) -> bool:
    """Whether `latent.py` can be used on the device."""
    if device.type != "cuda":
        return False
    return problem_of_latent_kernel(torch.cuda.get_device_capability(device)[0]) is None


def _stored(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a kernel stores a result that is wanted in `dtype`; it computes in fp32."""
    return dtype if dtype is not None and dtype.itemsize == 2 else torch.float32


def _aligned(x: Tensor) -> Tensor:
    """`unit_stride` of x, copied if it does not begin at a multiple of 16 bytes: Triton would compile kernels again.

    So it is where rows are taken from the middle of a tensor and a row is not a multiple of 16 bytes.
    """
    x = unit_stride(x)
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _wide(q: Tensor) -> bool:
    """Whether products are computed in fp32."""
    return q.element_size() > 2
