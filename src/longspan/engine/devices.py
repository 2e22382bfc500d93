"""On what an engine runs: the kind of device, and where its ranks are.

It owns these two choices and the layouts that are named to a user who asks for too many GPUs.
"""

from __future__ import annotations

from itertools import islice

import torch

from longspan.config import require
from longspan.parallel.grid import layouts

_LAYOUTS_NAMED = 6


def resolve_device(name: str) -> str:
    """`cpu` or `cuda`. Raises `ConfigError` if a GPU is asked for and there is none."""
    found = torch.cuda.is_available()
    require(
        name != "cuda" or found, "device", name, f"this PyTorch ({torch.__version__}) finds no GPU",
        "use --device cpu, or install a CUDA build of PyTorch and check nvidia-smi",
    )  # fmt: skip
    return "cuda" if found and name != "cpu" else "cpu"


def choose_executor(wanted: str, device_type: str, ranks: int, gpus: int, extended: bool = False) -> str:
    """The name of the executor on a machine with `gpus` GPUs; `auto` is resolved.

    Ranks on a CPU are threads of one process, which share its weights. On GPUs each rank has a process and a GPU of its
    own: also a single one, because beside the scheduler's thread a rank's would wait for Python's lock. But if the
    engine is `extended`, one rank is a thread, because other processes do not know what is added. Raises `ConfigError`
    if there are too few GPUs.
    """
    chosen = wanted
    if wanted == "auto":
        chosen = "processes" if device_type == "cuda" and not (extended and ranks == 1) else "threads"
    fitting = ", ".join(layout.flags for layout in islice(layouts(gpus), _LAYOUTS_NAMED)) if gpus else ""
    require(
        chosen != "processes" or device_type != "cuda" or ranks <= gpus, "executor", wanted,
        f"gives each of the {ranks} ranks a GPU of its own, and this machine has {gpus}",
        f"use fewer ranks ({fitting}), --executor threads (virtual ranks that share one GPU), or ray or external with "
        "more machines",
    )  # fmt: skip
    return chosen
