"""Writing a step's KV to the cache, with quantisation, in one launch for each layer.

It owns the kernel and the table of slots; it must not know which requests the rows belong to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.attention.backends.triton.config import FUSED
from longspan.attention.rows import LARGEST, CacheRows, unit_stride
from longspan.attention.step_buffer import StepBuffer
from longspan.early_launch import early_options, wait_for_inputs
from longspan.plan.decode import DecodeWrites
from longspan.plan.view import WriteRun

_ELEMENTS = 2048  # elements that one program writes: 16 for each thread
_WARPS = 4


class TritonSlotWriter:
    """A `Writer` to the slot of each row, or none if it is -1, in int32 [T] on the device."""

    def __init__(self, slots: Tensor) -> None:
        self._slots = slots

    def write(self, cache: CacheRows, k: Tensor, v: Tensor) -> None:
        """See `Writer.write`. Raises `ValueError` if k has another number of rows than this writer."""
        if len(k) != len(self._slots):
            raise ValueError(f"{len(k)} rows for a writer of {len(self._slots)}")
        kv_factor, heads, _, width = cache.values.shape
        if not len(k):
            return
        k, v = unit_stride(k), unit_stride(v if kv_factor > 1 else k)
        quantised = cache.scales is not None
        widths = cache.groups if quantised else _power_and_rest(width)
        scales = cache.values if cache.scales is None else cache.scales
        rows = max(1, _ELEMENTS // triton.next_power_of_2(max(widths)))
        _write_kernel[(triton.cdiv(len(k) * heads, rows), kv_factor)](
            self._slots, k, v, cache.values, scales, (*k.stride()[:2], *v.stride()[:2]),
            cache.values.stride()[:3], scales.stride()[:3], len(k) * heads, heads,
            WIDTHS=widths, LARGEST=LARGEST[cache.values.dtype] if quantised else 0.0,
            ROUND=cache.values.dtype == torch.int8, ROWS=rows, num_warps=_WARPS, enable_fp_fusion=FUSED,
            **early_options(k.device),
        )  # fmt: skip


class TritonWriter(TritonSlotWriter):
    """See `RefillableWriter`. It has the slots on the host as well."""

    def __init__(
        self, writes: Sequence[WriteRun], rows: int, device: torch.device, buffer: StepBuffer | None = None
    ) -> None:
        self._field = (buffer or StepBuffer(device, rows)).reserve(rows)
        super().__init__(self._field.device)
        self.refill(writes)
        self._field.send()

    def refill(self, writes: Sequence[WriteRun]) -> None:
        """See `RefillableWriter.refill`. Rows of no run are not written."""
        slots = self._field.host
        slots[:] = -1
        if isinstance(writes, DecodeWrites):
            if len(writes) and len(writes) == writes.rows[-1] + 1:  # every row of the first ones
                slots[: len(writes)] = writes.slots
            else:
                slots[writes.rows] = writes.slots
            return
        for run in writes:
            if run.length == 1:
                slots[run.row] = run.slot
            else:
                slots[run.row : run.row + run.length] = range(run.slot, run.slot + run.length)


def _power_and_rest(width: int) -> tuple[int, ...]:
    """A width as a power of two and the rest, 576 as 512 + 64: tiles are powers of two, and unused lanes idle."""
    power = 1 << (width.bit_length() - 1)
    return (power,) if power == width else (power, width - power)


@triton.jit
def _write_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    slots, k, v, values, scales, source_strides, value_strides, scale_strides, units, heads,
    WIDTHS: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (block, keys or values): write `ROWS` pairs of (row, head), of `units` in all.

    `WIDTHS` are the widths of the scale groups, `LARGEST` is the largest quantised number, or 0 without quantisation.
    With `ROUND` values are rounded to integers.
    """
    wait_for_inputs(EARLY)  # slots too may be found by a kernel before this one
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, head = unit // heads, (unit % heads).to(tl.int64)
    slot = tl.load(slots + row, mask=unit < units, other=-1).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)
    to = values + plane * value_strides[0] + head * value_strides[1] + slot * value_strides[2]
    scale_to = scales + plane * scale_strides[0] + head * scale_strides[1] + slot * scale_strides[2]
    row = row.to(tl.int64)
    if plane == 0:
        source = k + row * source_strides[0] + head * source_strides[1]
        _write_rows(source, to, scale_to, slot >= 0, WIDTHS, LARGEST, ROUND)
    else:
        source = v + row * source_strides[2] + head * source_strides[3]
        _write_rows(source, to, scale_to, slot >= 0, WIDTHS, LARGEST, ROUND)


@triton.jit
def _write_rows(  # type: ignore[no-untyped-def]
    source, to, scale_to, wanted, WIDTHS: tl.constexpr, LARGEST: tl.constexpr, ROUND: tl.constexpr
):
    """Copy rows from pointers `source` to pointers `to`, group by group, quantised with a scale for each group."""
    first = 0
    for group in tl.static_range(len(WIDTHS)):
        column = tl.arange(0, triton.next_power_of_2(WIDTHS[group]))
        mask = wanted[:, None] & (column < WIDTHS[group])[None, :]
        x = tl.load(source[:, None] + first + column[None, :], mask=mask, other=0.0)
        if LARGEST > 0:
            x = x.to(tl.float32)
            scale = tl.div_rn(tl.max(tl.abs(x), axis=1), LARGEST)
            tl.store(scale_to + group, scale, mask=wanted)
            x = tl.div_rn(x, tl.maximum(scale, 1.1754943508222875e-38)[:, None])  # the smallest normal: see `quantise`
            if ROUND:
                x = (x + 12582912.0) - 12582912.0  # adding 1.5 · 2^23 rounds to an integer, half to even
        tl.store(to[:, None] + first + column[None, :], x.to(to.dtype.element_ty), mask=mask)
        first += WIDTHS[group]
