"""The sum over the GPUs of one machine, its addition to the residual and the norm behind it, in one launch.

It owns the kernel, the memory through which members exchange rows, and the order of writing and reading it; the sum
followed by `LayerOps.add_norm` is the reference. Row r of a launch is a program on every member, and has places of its
own in the memory of each: two areas, which launches use in turn, and a flag of every member.

**Order.** A program writes its member's row into the area of this turn, sets its flag at all members and waits for
theirs; then it reads the rows of all. It does not wait again before it ends: a member writes the same area two turns
later, and by then has seen every member's flag of the turn between, which that member sets in a launch that begins
when this one has ended there. Turns are counted in each member's own memory, so launches may be eager or in CUDA
graphs that are replayed in any order, if it is the same on all members. PyTorch's sums have other flags.

**A member that never comes**, because its process has failed, leaves the programs of the others waiting, and with them
their GPUs, until their processes end; so do PyTorch's sums. An engine ends all of its ranks when one has died, and when
a step takes too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.early_launch import early_options, wait_for_inputs
from longspan.norm_arithmetic import normalised

_DTYPE = torch.bfloat16
_ROWS = 64  # of a launch, at most; so many programs run at the same time, which waiting for each other needs
_WIDTH = 16384  # elements of a row, at most
_TOGETHER = 8  # adjacent elements that a thread adds, of each member: 16 bytes
_WARPS = 4, 32  # least and most of a program
_AREAS = _ROWS * 2 * _WIDTH
_MOST_MEMBERS = 8


class SumNorm:
    """Sums few rows over the members of a group, with the norm behind them.

    `members` are the shared memory of each member [ELEMENTS], as this one reads it; member `own` is this one. Their
    number is a power of two. At most `most` bytes are summed by one launch.
    """

    # of the memory that each member shares; filled with zeros before it is shared
    ELEMENTS: ClassVar[int] = _AREAS + _ROWS * _MOST_MEMBERS * torch.int64.itemsize // _DTYPE.itemsize
    # of a launch, at most
    ROWS: ClassVar[int] = _ROWS

    def __init__(self, members: Sequence[Tensor], own: int, most: int) -> None:
        self._own = own
        self._most = most
        self._areas = tuple(member[:_AREAS] for member in members)
        self._flags = [member[_AREAS:].view(torch.int64) for member in members]
        device = members[own].device
        self._flags_at = torch.tensor([flags.data_ptr() for flags in self._flags], dtype=torch.int64, device=device)
        self._turns = torch.zeros(_ROWS, dtype=torch.int64, device=device)

    def takes(self, x: Tensor, residual: Tensor, weight: Tensor) -> bool:
        """Whether one launch computes this. It follows from shapes and dtypes, which all members have alike."""
        rows, width = x.shape
        fits = 0 < rows <= _ROWS and width <= _WIDTH and width % _TOGETHER == 0
        fits = fits and x.numel() * _DTYPE.itemsize <= self._most
        return fits and x.dtype == residual.dtype == weight.dtype == _DTYPE

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(residual + the sum of x over the members, the norm of this), [T, width], with the same bits on all members.

        The sum is in fp32, in the order of members, and rounded once; the rest is `LayerOps.add_norm`.
        """
        return self._launch(x, residual, weight, eps, only_compile=False)

    def compile(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        """Compile the kernel for such arguments. Waits for nobody."""
        self._launch(x, residual, weight, eps, only_compile=True)

    def _launch(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, only_compile: bool
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        block = triton.next_power_of_2(width)
        launch = partial(sum_norm_kernel.warmup, grid=(rows,)) if only_compile else sum_norm_kernel[(rows,)]
        launch(
            x, residual, weight, total, out, self._areas, self._areas[self._own], self._flags[self._own],
            self._flags_at, self._turns, self._own, (x.stride(0), residual.stride(0)), eps,
            WIDTH=width, BLOCK=block, MEMBERS=len(self._areas), AREA=_WIDTH,
            num_warps=warps_of(block), **early_options(x.device),
        )  # fmt: skip
        return total, out


def warps_of(block: int) -> int:
    """Warps of a program that computes `block` elements: a thread has few of every member's, all loaded together."""
    least, most = _WARPS
    return min(most, max(least, block // (32 * _TOGETHER)))


@triton.jit(do_not_specialize=("own",))
def sum_norm_kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    x, residual, weight, total, out, areas, own_areas, own_flags, flags_at, turns, own, strides, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, MEMBERS: tl.constexpr, AREA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row): total = residual + the sum of x over the members, and its norm.

    `areas` are those of all members, each [row, turn % 2, AREA]; `flags_at` the addresses of their flags, each
    [row, MEMBERS]; `own_areas` and `own_flags` are this member's. `strides` are those of rows, of x and residual.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    kind = out.dtype.element_ty
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    turn = tl.load(turns + row) + 1
    area = (2 * row + (turn & 1)) * AREA + column
    tl.store(own_areas + area, tl.load(x + row * strides[0] + column, mask=inside, other=0.0), mask=inside)
    before = tl.load(residual + row * strides[1] + column, mask=inside, other=0.0).to(tl.float32)
    meet(own_flags + row * MEMBERS, flags_at, row * MEMBERS + own, turn, MEMBERS)
    parts = (tl.load(areas[0] + area, mask=inside, other=0.0),)
    for member in tl.static_range(1, MEMBERS):  # all loads are in flight together
        parts = parts + (tl.load(areas[member] + area, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    values = parts[0].to(tl.float32)
    for member in tl.static_range(1, MEMBERS):
        values += parts[member].to(tl.float32)
    values = (before + values.to(kind).to(tl.float32)).to(kind)
    tl.store(total + row * WIDTH + column, values, mask=inside)
    tl.store(out + row * WIDTH + column, normalised(values.to(tl.float32), factor, eps, kind, WIDTH), mask=inside)
    tl.store(turns + row, turn)


@triton.jit
def meet(own_flags, flags_at, place, turn, MEMBERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell all members that this program has come to `turn`, and wait until theirs have.

    What they stored before is seen afterwards. `own_flags` are this program's [MEMBERS]; `place` is that of its flag
    among those of each member. A member may be one turn ahead. One thread sets and reads each flag.
    """
    member = tl.arange(0, MEMBERS)
    theirs = tl.load(flags_at + member).to(tl.pointer_type(tl.int64)) + place
    tl.debug_barrier()  # all threads have stored
    tl.atomic_xchg(theirs, turn, sem="release", scope="sys")
    while tl.min(tl.atomic_add(own_flags + member, 0, sem="acquire", scope="sys"), axis=0) < turn:
        pass
    tl.debug_barrier()
