"""Compiles the kernels of this package with the machine's C++ compiler, and opens them.

It owns the compiler's command, the folder in which the result is kept, and the reasons why there is none; it must not
know what the kernels compute.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from longspan.errors import EngineError

_SOURCE = Path(__file__).with_name("kernels.cpp")
_COMPILERS = ("g++", "c++")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno")
_SECONDS = 120.0  # a compiler that takes longer is given up
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_ARGUMENTS = {
    "pack": "ppii", "product": "ppppiii", "attend": "piippiippiiiifpippppip", "write": "piipiippiii",
    "norm": "pipipppiiif", "swiglu": "pipii", "rope": "piipppfiiii", "lookup": "piipiiip",
}  # fmt: skip


class KernelProblem(Exception):
    """Why there are no compiled kernels; always caught."""


def problem_of_kernels() -> str | None:
    """Why this machine has no compiled kernels; None if it has them, which are then open."""
    return _opened()[1]


def address(x: Tensor) -> int:
    """Where an fp32 tensor begins. Raises `TypeError` for what a kernel cannot read: see `kernels.cpp`."""
    if x.dtype is not torch.float32 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise TypeError(f"a compiled kernel takes fp32 rows of adjacent elements, not {x.dtype} with {x.stride()}")
    return x.data_ptr()


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises `EngineError` where `problem_of_kernels` names a problem."""
    found, problem = _opened()
    if found is None:
        raise EngineError(f"this machine has no compiled kernels ({problem}); give all ranks --cpu-kernels plain")
    return found


@cache
def _opened() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return open_kernels(Path.home() / ".cache" / "longspan" / "kernels"), None
    except (KernelProblem, RuntimeError) as problem:  # RuntimeError: no home
        return None, str(problem)


def open_kernels(folder: Path) -> ctypes.CDLL:
    """Open the kernels, which are compiled first unless `folder` has them. Raises `KernelProblem`.

    If the folder cannot be written, or another user could write to it, they are compiled into a temporary one.
    """
    if platform.system() != "Linux":
        raise KernelProblem(f"they are for Linux, not {platform.system()}")
    name = f"kernels-{_fingerprint()}.so"
    if _is_own(folder) and (folder / name).is_file():
        with suppress(KernelProblem):  # a damaged file is replaced
            return _open(folder / name)
    with tempfile.TemporaryDirectory(prefix="longspan-kernels-") as temporary:
        built = _compile(Path(temporary))
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(folder):
                _keep(built, folder / name)
        return _open(built)


def _is_own(folder: Path) -> bool:
    """Whether this user owns the folder, and no other may write to it."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _keep(built: Path, target: Path) -> None:
    """Copy in a way that a process which opens `target` never finds a part of it."""
    handle, name = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    try:
        shutil.copyfile(built, name)
        Path(name).replace(target)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _fingerprint() -> str:
    """What the compiled file depends on: source, flags, compiler, processor, and PyTorch's OpenMP."""
    processor = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        processor += "".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU part")))
    parts = (_SOURCE.read_text(), " ".join(_FLAGS), _compiler() or "", processor, torch.__version__)
    return sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compiler() -> str | None:
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def _compile(folder: Path) -> Path:
    """Compile into `folder`.

    The object is linked without OpenMP's library: its functions are those that PyTorch has loaded. With a library of
    its own a process would have twice as many threads, which wait for each other.
    """
    compiler = _compiler()
    if compiler is None:
        raise KernelProblem(f"there is no C++ compiler ({' or '.join(_COMPILERS)})")
    compiled, linked = folder / "kernels.o", folder / "kernels.so"
    for command in (
        [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
        [compiler, "-shared", str(compiled), "-o", str(linked)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelProblem(f"{compiler} does not run: {error}") from error
        if done.returncode:
            raise KernelProblem(f"{compiler} fails: {(done.stderr.strip() or 'no message').splitlines()[0]}")
    return linked


def _open(file: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(file))
        for name, types in _ARGUMENTS.items():
            getattr(found, name).argtypes = [_TYPES[one] for one in types]
    except (OSError, AttributeError) as error:
        raise KernelProblem(f"the compiled file cannot be opened: {error}") from error
    return found
