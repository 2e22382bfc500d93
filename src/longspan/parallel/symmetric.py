"""Sums over the GPUs of one machine through memory that all of them read: PyTorch's symmetric memory.

It owns the memory, which kernel sums how many bytes, and the checks before any of it is used; NCCL sums what it does
not take. Sums with the norm behind them in one launch are in `sum_norm.py`, which needs Triton, and are checked here.
All members decide alike, from the size of a group and of a tensor. Before anything in which a member waits for others,
all of them agree that they can do it, because one that fails alone would leave the others waiting. It has not run
between GPUs yet.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import EngineError

if TYPE_CHECKING:
    from longspan.parallel.sum_norm import SumNorm

_DTYPE = torch.bfloat16
_ELEMENTS = 4 << 20  # of the memory: 8 MiB. NCCL is as fast for more
_ALIGNMENT = 16  # bytes, of which a tensor must be a multiple
# most bytes that every member reads whole, by size of group. Other sizes may add in another order on each member
_READ_WHOLE = {2: 2 * _ELEMENTS, 4: 512 << 10, 8: 256 << 10}
_CAPABILITY, _MOST_MEMBERS = 8, 8
_TOLERANCE = 0.02  # largest error of the trial sums, relative to the largest element
_WIDTH, _EPS = 1024, 1e-5  # of the trial sums with a norm
_PATIENCE = 60.0  # seconds in which a member must have shared its memory, and have computed a trial sum
_REASON_BYTES = 256  # of what a member tells the others

T = TypeVar("T")


@dataclass(frozen=True)
class SharedBuffers:
    """Memory that the members of a group have shared."""

    # whether the switch between the GPUs can add
    multicast: bool
    # the memory of each member [elements], as this one reads and writes it, in the order of members
    members: tuple[Tensor, ...]


class SharedMemory(Protocol):
    """What PyTorch's symmetric memory does here. Tests replace it."""

    # with the operations of `torch.ops.symm_mem`
    kernels: Any

    def problem(self, device: torch.device, size: int) -> str | None:
        """Why this member cannot share memory with `size` - 1 others, as far as it can tell alone; None if it can."""
        ...

    def allocate(self, elements: int, device: torch.device) -> Tensor:
        """Memory bf16 [elements] that can be shared. Waits for nobody."""
        ...

    def share(self, buffer: Tensor, members: dist.ProcessGroup) -> SharedBuffers:
        """Share it with the other members of a group; waits for them."""
        ...


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


@dataclass(frozen=True)
class FastSums:
    """What sums over a group through symmetric memory."""

    # sums
    plain: SymmetricSum
    # sums of few rows with the norm behind them; None if these are two operations
    with_norm: SumNorm | None


def open_symmetric_sums(
    members: dist.ProcessGroup, device: torch.device, memory: SharedMemory | None = None, patience: float = _PATIENCE
) -> tuple[FastSums | None, str]:
    """(what sums over a group, and why it is used), or (None, why NCCL sums). All members must call it together.

    Raises `EngineError` if a trial sum has not ended after `patience` seconds, because then no other work would end on
    this GPU. Memory that has not been shared by then is not used.
    """
    memory, agreement = memory or _TorchMemory(), _Agreement(members, device, patience)
    try:
        agreement.require(lambda: memory.problem(device, members.size()))
        if len(set(agreement.said(socket.gethostname()))) > 1:
            return None, "NCCL: members are on different machines"
        buffer = agreement.of(lambda: memory.allocate(_ELEMENTS, device))
        shared = agreement.of(lambda: agreement.in_time(lambda: memory.share(buffer, members)))
        summing = SymmetricSum(buffer, members.group_name, members.size(), shared.multicast, memory.kernels)
        for count in (1 << 10, _ELEMENTS):  # few are read whole by every member
            _try_sum(summing, count, agreement)
    except _Refused as reason:
        return None, f"NCCL: {reason}"
    with_norm, how = _open_sum_norm(memory, agreement)
    return FastSums(summing, with_norm), f"symmetric memory for up to {2 * _ELEMENTS >> 20} MiB, else NCCL; {how}"


def _open_sum_norm(memory: SharedMemory, agreement: _Agreement) -> tuple[SumNorm | None, str]:
    """(what sums few rows with the norm behind them, a description), or (None, why the norm is a launch of its own)."""
    members, device = agreement.members, agreement.device
    most = _READ_WHOLE.get(members.size())
    if most is None:
        return None, f"norms apart: one launch is for {', '.join(map(str, _READ_WHOLE))} GPUs"
    try:
        kind = agreement.of(_import_sum_norm, "the kernel")
        buffer = agreement.of(lambda: memory.allocate(kind.ELEMENTS, device).zero_())
        shared = agreement.of(lambda: agreement.in_time(lambda: memory.share(buffer, members)))
        with_norm = agreement.of(lambda: kind(shared.members, members.rank(), most), "the kernel")
        for rows in (1, kind.ROWS, 1):  # the first row three times, so in both of its areas
            _try_sum_norm(with_norm, rows, agreement)
    except _Refused as reason:
        return None, f"norms apart: {reason}"
    return with_norm, "few rows in one launch with their norm"


def _import_sum_norm() -> type[SumNorm]:
    from longspan.parallel.sum_norm import SumNorm  # needs Triton

    return SumNorm


class _Refused(Exception):
    """A step has failed on some member; all of them raise this together."""


class _Late(Exception):
    """Something has not ended in time."""


class _Agreement:
    """Steps that all members take, or none. Each method must be called by all members, in the same order."""

    def __init__(self, members: dist.ProcessGroup, device: torch.device, patience: float) -> None:
        self.members = members
        self.device = device
        self._patience = patience

    def of(self, step: Callable[[], T], subject: str = "PyTorch's symmetric memory") -> T:
        """What `step` returns, if it succeeds on all members; else `_Refused`, which says that `subject` fails."""
        found: list[T] = []
        problem = ""
        try:
            found.append(step())
        except EngineError:
            raise
        except Exception as error:  # whatever it is, the others must know
            problem = f"{subject} fails: {(str(error).splitlines() or [type(error).__name__])[0]}"
        self.require(lambda: problem or None)
        return found[0]

    def require(self, check: Callable[[], str | None]) -> None:
        """Raise `_Refused` with the first member's problem, if `check` returns one on any."""
        reasons = self.said(check() or "")
        member = next((number for number, reason in enumerate(reasons) if reason), None)
        if member is not None:
            whose = "" if len(set(reasons)) == 1 else f" (member {member} of {len(reasons)})"
            raise _Refused(reasons[member] + whose)

    def said(self, text: str) -> list[str]:
        """What all members say, in their order; of long texts the beginning."""
        mine = text.encode(errors="replace")[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        received = torch.zeros(self.members.size(), _REASON_BYTES, dtype=torch.uint8, device=self.device)
        received[self.members.rank()] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        dist.all_reduce(received, group=self.members)
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in received]

    def in_time(self, step: Callable[[], T]) -> T:
        """What `step` returns. Raises `_Late` if it has not ended in time; then its thread is left behind."""
        found: list[T] = []
        failed: list[Exception] = []
        inference = torch.is_inference_mode_enabled()  # of this thread only

        def work() -> None:
            on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
            try:
                with on_device, torch.inference_mode(inference):
                    found.append(step())
            except Exception as error:
                failed.append(error)

        thread = Thread(target=work, name="symmetric memory", daemon=True)
        thread.start()
        thread.join(self._patience)
        if failed:
            raise failed[0]
        if not found:
            raise _Late(f"nothing happens for {self._patience:.0f} s, because another member failed or hangs")
        return found[0]


class _TorchMemory:
    """`SharedMemory` of PyTorch."""

    kernels = torch.ops.symm_mem

    def problem(self, device: torch.device, size: int) -> str | None:
        """See `SharedMemory.problem`."""
        if device.type != "cuda":
            return "symmetric memory is for GPUs"
        major, _ = torch.cuda.get_device_capability(device)
        if major < _CAPABILITY:
            return f"symmetric memory needs compute capability {_CAPABILITY}.0, this GPU's is {major}.x"
        if size > _MOST_MEMBERS:
            return f"symmetric memory serves up to {_MOST_MEMBERS} GPUs, not {size}"
        return None

    def allocate(self, elements: int, device: torch.device) -> Tensor:
        """See `SharedMemory.allocate`."""
        from torch.distributed import _symmetric_memory as symmetric_memory  # not in every build

        return symmetric_memory.empty(elements, dtype=_DTYPE, device=device)

    def share(self, buffer: Tensor, members: dist.ProcessGroup) -> SharedBuffers:
        """See `SharedMemory.share`. First by an operator, because waiting in it leaves Python's lock to others."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        if hasattr(self.kernels, "get_remote_tensors"):
            self.kernels.get_remote_tensors(buffer, members.group_name)
        handle = symmetric_memory.rendezvous(buffer, members.group_name)
        buffers = [handle.get_buffer(member, buffer.shape, buffer.dtype) for member in range(members.size())]
        return SharedBuffers(bool(handle.multicast_ptr), tuple(buffers))


def _try_sum(summing: SymmetricSum, count: int, agreement: _Agreement) -> None:
    """Sum `count` numbers. `_Refused` unless the sums are right, and the same on all members."""
    x = _random(agreement.members.rank(), agreement.device, count)
    _try(lambda: summing(x), _summed(x, agreement), agreement)


def _try_sum_norm(with_norm: SumNorm, rows: int, agreement: _Agreement) -> None:
    """Likewise, with the norm of the total. It is compiled before anything waits."""
    members, device = agreement.members, agreement.device
    x, residual = (_random(seed, device, rows, _WIDTH) for seed in (members.rank(), members.size()))
    weight = _random(members.size() + 1, device, _WIDTH)
    agreement.of(lambda: with_norm.compile(x, residual, weight, _EPS), "the kernel")
    total = residual.float() + _summed(x, agreement)
    normed = F.rms_norm(total, (_WIDTH,), weight.float(), _EPS)
    _try(lambda: torch.stack(with_norm(x, residual, weight, _EPS)), torch.stack([total, normed]), agreement)


def _random(seed: int, device: torch.device, *shape: int) -> Tensor:
    """Random bf16 numbers [*shape]."""
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)).to(_DTYPE)


def _summed(x: Tensor, agreement: _Agreement) -> Tensor:
    """The sum of x over the members in fp32, by their process group."""
    expected = x.float()
    dist.all_reduce(expected, group=agreement.members)
    return expected


def _try(compute: Callable[[], Tensor], expected: Tensor, agreement: _Agreement) -> None:
    """`_Refused` unless `compute` gives `expected`, of the same shape, and the same bits on all members."""
    device = agreement.device

    def computed() -> Tensor:
        found = compute().float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    def tried() -> Tensor:
        try:
            return agreement.in_time(computed)
        except _Late as error:
            raise EngineError(f"sums through symmetric memory: {error}; use --disable-custom-all-reduce") from None

    found = agreement.of(tried)
    ends = torch.stack([found, -found])
    dist.all_reduce(ends, dist.ReduceOp.MIN, group=agreement.members)
    error = float((found - expected).abs().max() / expected.abs().max())
    same = torch.equal(ends, torch.stack([found, -found]))
    wrong = None if error < _TOLERANCE else f"sums through symmetric memory are off by {error:.1%}"
    agreement.require(lambda: wrong or (None if same else "sums through symmetric memory differ between members"))
