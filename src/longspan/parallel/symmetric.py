"""Sums over the GPUs of one machine through memory that all of them read: PyTorch's symmetric memory.

It owns the memory, which kernel sums how many bytes, and the checks before any of it is used; NCCL sums what it does
not take. All members decide alike, from the size of a group and of a tensor. No GPU has run it yet.
"""

from __future__ import annotations

import socket
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPE = torch.bfloat16
_ELEMENTS = 4 << 20  # of the memory: 8 MiB. NCCL is as fast for more
_ALIGNMENT = 16  # bytes, of which a tensor must be a multiple
# most bytes that every member reads whole, by size of group. Other sizes may add in another order on each member
_READ_WHOLE = {2: 2 * _ELEMENTS, 4: 512 << 10, 8: 256 << 10}
_CAPABILITY, _MOST_MEMBERS = 8, 8
_TOLERANCE = 0.02  # largest error of the trial sums, relative to the largest element


class SymmetricSum:
    """Sums over a group of `size` members with one or three launches, which may be captured in a CUDA graph.

    `buffer` bf16 [elements] is memory that all members can read, `name` the group's name in torch.distributed, and
    `multicast` says whether the switch between the GPUs can add. Tests pass a replacement of `torch.ops.symm_mem`.
    """

    def __init__(self, buffer: Tensor, name: str, size: int, multicast: bool, kernels: Any = None) -> None:
        self._buffer = buffer
        self._name = name
        self._size = size
        self._multicast = multicast
        self._kernels = kernels or torch.ops.symm_mem

    def takes(self, x: Tensor) -> bool:
        """Whether it sums tensors as x."""
        count = x.numel()
        fits = 0 < count <= self._buffer.numel() and count * x.element_size() % _ALIGNMENT == 0
        return fits and x.dtype == self._buffer.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of x [...] over the members, of which all get the same bits. x must be one that it `takes`."""
        x = x.contiguous()
        mine = self._buffer[: x.numel()]
        if x.numel() * x.element_size() <= _READ_WHOLE.get(self._size, 0):
            summed: Tensor = self._kernels.one_shot_all_reduce_copy(mine, x.view(-1), "sum", self._name)
            return summed.view(x.shape)
        mine.copy_(x.view(-1))
        if self._multicast:
            self._kernels.multimem_all_reduce_(mine, "sum", self._name)
        else:
            self._kernels.two_shot_all_reduce_(mine, "sum", self._name)
        return mine.clone().view(x.shape)  # the next sum overwrites the memory


def open_symmetric_sum(members: dist.ProcessGroup, device: torch.device) -> tuple[SymmetricSum | None, str]:
    """(what sums over a group, and why it is used), or (None, why NCCL sums). All members must call it together."""
    problem, alone = _problem(device, members.size()), not _is_one_machine(members, device)
    if not _all(members, device, problem is None and not alone):
        return None, f"NCCL: {problem or 'a member is on another machine, or cannot read the memory of others'}"
    found: SymmetricSum | None = None
    try:
        found = _opened(members, device)
        problem = _trial(found, members, device)
    except (RuntimeError, AttributeError) as error:
        problem = f"PyTorch's symmetric memory fails: {str(error).splitlines()[0]}"
    if not _all(members, device, problem is None):
        return None, f"NCCL: {problem or 'symmetric memory fails on another member'}"
    return found, f"symmetric memory for up to {2 * _ELEMENTS >> 20} MiB, else NCCL"


def _opened(members: dist.ProcessGroup, device: torch.device) -> SymmetricSum:
    """Share memory with the other members."""
    from torch.distributed import _symmetric_memory as symmetric_memory  # not in every build

    buffer = symmetric_memory.empty(_ELEMENTS, dtype=_DTYPE, device=device)
    shared = symmetric_memory.rendezvous(buffer, members.group_name)
    return SymmetricSum(buffer, members.group_name, members.size(), bool(shared.multicast_ptr))


def _problem(device: torch.device, size: int) -> str | None:
    """Why this member cannot use symmetric memory; None as far as it can tell alone."""
    if device.type != "cuda":
        return "symmetric memory is for GPUs"
    major, _ = torch.cuda.get_device_capability(device)
    if major < _CAPABILITY:
        return f"symmetric memory needs compute capability {_CAPABILITY}.0, this GPU's is {major}.x"
    if size > _MOST_MEMBERS:
        return f"symmetric memory serves up to {_MOST_MEMBERS} GPUs, not {size}"
    return None


def _is_one_machine(members: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all members have one host name."""
    mine = crc32(socket.gethostname().encode())
    ends = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MIN, group=members)
    return ends.tolist() == [mine, -mine]


def _all(members: dist.ProcessGroup, device: torch.device, fine: bool) -> bool:
    """Whether it is fine on all members."""
    least = torch.tensor([int(fine)], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=members)
    return bool(least.item())


def _trial(summing: SymmetricSum, members: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why its sums cannot be used; None if they are right and the same on all members. Of few and of many elements."""
    for count in (1 << 10, _ELEMENTS):
        generator = torch.Generator(device).manual_seed(members.rank())
        x = torch.randn(count, device=device, generator=generator).to(_DTYPE)
        expected = x.float()
        dist.all_reduce(expected, group=members)
        found = summing(x).float()
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < _TOLERANCE:
            return f"sums through symmetric memory are off by {error:.1%}"
        ends = torch.stack([found, -found])
        dist.all_reduce(ends, dist.ReduceOp.MIN, group=members)
        if not torch.equal(ends, torch.stack([found, -found])):
            return "sums through symmetric memory differ between members"
    return None
