"""Records calls of the compiled kernels, and repeats them all by one call.

It owns the recorded calls and the memory of the tensors that are made between them; it must not know what is computed.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import local
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "r": ctypes.c_int64, "f": ctypes.c_float}
"""The types of arguments: pointer, integer, number of rows of the step, float."""

Call = Callable[..., None]
_aten = torch.ops.aten


class NotRecordable(Exception):
    """Why work cannot be repeated by calls of the compiled kernels alone."""


class _Current(local):
    """The recording of a thread."""

    # takes the calls of this thread instead of the kernels; None: they run
    recording: Recording | None = None


class Kernels:
    """The functions of the compiled file. While a thread records, those that compute a step are not run but noted."""

    # products: see `kernels.cpp` for what each of them does
    product: Call
    product_blocks: Call
    lookup: Call
    lookup_blocks: Call
    # attention
    attend: Call
    write: Call
    # operations between products
    norm: Call
    swiglu: Call
    rope: Call
    rope_table: Call
    # what no step calls
    pack: Call
    pack_blocks: Call
    panel_width: Callable[[], int]
    lanes: Callable[[], int]

    def __init__(self, opened: ctypes.CDLL, arguments: Mapping[str, str]) -> None:
        """`arguments` has the types of the functions that compute a step, as letters of `TYPES`."""
        self._current = _Current()
        self._replay = opened.replay
        for name, types in arguments.items():
            setattr(self, name, self._call(getattr(opened, name), getattr(opened, f"{name}_by_words"), types))
        self.pack, self.pack_blocks = opened.pack, opened.pack_blocks
        self.panel_width, self.lanes = opened.panel_width, opened.lanes

    def _call(self, run: Call, by_words: Any, types: str) -> Call:
        function, current = ctypes.cast(by_words, ctypes.c_void_p).value, self._current

        def call(*arguments: float | None) -> None:
            if (recording := current.recording) is None:
                run(*arguments)
            else:
                recording.add(function or 0, types, arguments)

        return call

    def record(self, work: Callable[[], Tensor], rows: Tensor, most: int) -> RecordedCalls:
        """Record work on `most` rows, without running it. The returned function runs it on the first `rows` int64 [1].

        Tensors that the work makes are in memory of the recording, in which one that is gone makes room for the next.
        All others whose addresses it takes must be kept by the caller. Raises `NotRecordable` if the work computes
        anything but by these kernels.
        """
        recording = Recording(most)
        memory = RecordedMemory()
        self._current.recording = recording
        try:
            with memory:
                result = work()
        finally:
            self._current.recording = None
        return RecordedCalls(self._replay, recording, memory, result, rows)


class Recording:
    """Calls as words of 64 bits: function, number of arguments, arguments. `replay` in `kernels.cpp` reads them."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._words = array("q")
        self._places = array("q")  # the words that are the number of rows

    def add(self, function: int, types: str, arguments: Sequence[float | None]) -> None:
        """Note one call. Raises `NotRecordable` if it is for other rows than those of the step."""
        self._words.extend((function, len(types)))
        for kind, value in zip(types, arguments, strict=True):
            if kind == "r":
                if value != self._rows:
                    raise NotRecordable(f"an operation on {value} rows in a step of {self._rows}")
                self._places.append(len(self._words))
            self._words.append(_float_word(value) if kind == "f" else int(value or 0))

    def finish(self) -> tuple[int, int, int, int]:
        """Address and number of the words, and of the places of rows; nothing may be added afterwards."""
        return *self._words.buffer_info(), *self._places.buffer_info()


def _float_word(value: float | None) -> int:
    word: int = struct.unpack("<q", struct.pack("<fi", value, 0))[0]
    return word


class RecordedCalls:
    """Calls that are repeated on the present contents of their inputs, with the memory that they use."""

    def __init__(
        self, replay: Call, recording: Recording, memory: RecordedMemory, result: Tensor, rows: Tensor
    ) -> None:
        self._run = partial(replay, *recording.finish(), rows.data_ptr())
        self._held = recording, memory, rows  # as long as these calls
        self._result = result

    def __call__(self) -> Tensor:
        """Repeat the calls, and return their result, of which the first rows are valid."""
        self._run()
        return self._result


class RecordedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives memory that stays to tensors that are made meanwhile, and refuses everything that computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._free: list[tuple[int, int, NDArray[np.uint8]]] = []  # ascending: bytes, number, block
        self._blocks: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to do so PyTorch would import its compiler, which takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch for each of its operations."""
        kwargs = kwargs or {}
        if func is _aten.new_empty.default:
            return self._empty(args[1], kwargs.get("dtype") or args[0].dtype)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of other operations, which may or may not compute
                return func.decompose(*args, **kwargs)
        if func.is_view and func is not _aten.lift_fresh.default:  # which is a new tensor with values
            return func(*args, **kwargs)
        raise NotRecordable(f"PyTorch computes {func}")

    def _empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the smallest free block that has room, which is free again when no tensor uses it any more."""
        count = int(np.prod(size)) * dtype.itemsize
        found = next((place for place, block in enumerate(self._free) if block[0] >= count), None)
        if found is None:
            self._blocks.append(torch.empty(count, dtype=torch.uint8))
            block = count, len(self._blocks), self._blocks[-1].numpy()
        else:
            block = self._free.pop(found)
        used = block[2][:count]  # PyTorch refers to this view as long as a tensor uses it
        weakref.finalize(used, insort, self._free, block).atexit = False
        return torch.from_numpy(used).view(dtype).view(*size)
