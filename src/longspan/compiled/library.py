"""Compiles the kernels of this package with the machine's C++ compiler, and opens them.

It owns the compiler's command and the reasons why there are no kernels; it must not know what they compute.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from longspan.compiled.folder import KeptFiles
from longspan.compiled.recording import TYPES, Kernels
from longspan.errors import EngineError

_SOURCE = Path(__file__).with_name("kernels.cpp")
_INCLUDED = ("vectors.h", "products.h", "cache_rows.h", "attention.h", "blocks.h")  # beside it
_COMPILERS = ("g++", "c++")
# kernels are as fast as with -O3, and are compiled in two thirds of the time
_FLAGS = (
    "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-std=c++17", "-fPIC", "-fopenmp",
    "-fno-math-errno",
)  # fmt: skip
# calls within the file are those of its own functions: the process has a `write` too
_LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic")
_SECONDS = 120.0  # a compiler that takes longer is given up
_ARGUMENTS = {  # of the functions that compute a step, as letters of `TYPES`
    "product": "pppprii", "product_blocks": "ppppppriiii", "lookup": "pripiiip", "lookup_blocks": "pripppiiiip",
    "attend": "piipiiiippiiiifp", "write": "piipiipiiiip", "norm": "pipipppirif", "swiglu": "pipri",
    "rope": "piipppfriii", "rope_table": "ppfppri",
}  # fmt: skip


class KernelProblem(Exception):
    """Why there are no compiled kernels; always caught."""


def problem_of_kernels() -> str | None:
    """Why this machine has no compiled kernels; None if it has them, which are then open."""
    return _opening().result()[1]


def address(x: Tensor) -> int:
    """Where an fp32 tensor begins. Raises `TypeError` for what a kernel cannot read: see `kernels.cpp`."""
    if x.dtype is not torch.float32 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise TypeError(f"a compiled kernel takes fp32 rows of adjacent elements, not {x.dtype} with {x.stride()}")
    return x.data_ptr()


def library() -> Kernels:
    """The compiled kernels. Raises `EngineError` where `problem_of_kernels` names a problem."""
    found, problem = _opening().result()
    if found is None:
        raise EngineError(f"this machine has no compiled kernels ({problem}); give all ranks --cpu-kernels plain")
    return found


def begin_to_open() -> None:
    """Begin to open the kernels, which may have to be compiled: `problem_of_kernels` and `library` wait for it."""
    _opening()


@cache
def _opening() -> Future[tuple[Kernels | None, str | None]]:
    """The library, or why there is none. A thread waits for the compiler, and no exit of the process for the thread."""
    found: Future[tuple[Kernels | None, str | None]] = Future()

    def run() -> None:
        try:
            found.set_result((open_kernels(KeptFiles.of_user()), None))
        except KernelProblem as problem:
            found.set_result((None, str(problem)))
        except BaseException as error:  # whoever waits for the result raises it
            found.set_exception(error)

    Thread(target=run, name="longspan-kernels", daemon=True).start()
    return found


def open_kernels(kept: KeptFiles) -> Kernels:
    """Open the kernels, which are compiled first unless they are kept. Raises `KernelProblem`."""
    if platform.system() != "Linux":
        raise KernelProblem(f"they are for Linux, not {platform.system()}")
    name = f"kernels-{fingerprint()}.so"
    if found := kept.path(name):
        with suppress(KernelProblem):
            return _open(found)
    try:
        with tempfile.TemporaryDirectory(prefix="longspan-kernels-", ignore_cleanup_errors=True) as temporary:
            built = _compile(Path(temporary))
            kept.keep(name, built.read_bytes())
            return _open(built)
    except OSError as error:
        raise KernelProblem(f"they cannot be compiled: {error}") from error


@cache
def fingerprint() -> str:
    """What the compiled file depends on: source, flags, compiler, processor, and PyTorch's OpenMP."""
    processor = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        processor += "".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU part")))
    sources = [file.read_text() for file in (_SOURCE, *map(_SOURCE.with_name, _INCLUDED))]
    parts = (*sources, " ".join((*_FLAGS, *_LINK_FLAGS)), _compiler() or "", processor, torch.__version__)
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
        raise KernelProblem(f"there is no C++ compiler: install {' or '.join(_COMPILERS)}")
    compiled, linked = folder / "kernels.o", folder / "kernels.so"
    for command in (
        [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
        [compiler, *_LINK_FLAGS, str(compiled), "-o", str(linked)],
    ):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelProblem(f"{compiler} does not run: {error}") from error
        if done.returncode:
            raise KernelProblem(f"{compiler} fails: {(done.stderr.strip() or 'no message').splitlines()[0]}")
    return linked


def _open(file: Path) -> Kernels:
    try:
        found = ctypes.CDLL(str(file))
        for name, types in {**_ARGUMENTS, "pack": "ppii", "pack_blocks": "ppiii", "replay": "pipip"}.items():
            getattr(found, name).argtypes = [TYPES[one] for one in types]
        return Kernels(found, _ARGUMENTS)
    except (OSError, AttributeError) as error:
        raise KernelProblem(f"the compiled file cannot be opened: {error}") from error
