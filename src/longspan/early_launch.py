"""Kernels that start before the one before them has ended: programmatic dependent launch, on Hopper and later.

It owns where this is possible, and the wait that every such kernel must make. A kernel that is launched early starts as
soon as every program of the one before it has called `wait_for_inputs`. Therefore all of its programs call it too,
those without work as well. Before that they load only what was written before the step began, such as weights and
tables of work, and they store nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LEAST_MAJOR = 9  # compute capability of the first devices with it


@cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels on `device` are launched early. Never in Triton's interpreter.

    Asked once for each device: every launch needs the answer, and a step has hundreds.
    """
    if device.type != "cuda" or torch.version.hip or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device)[0] >= _LEAST_MAJOR


def early_options(device: torch.device) -> dict[str, Any]:
    """What each launch of a kernel that calls `wait_for_inputs(EARLY)` is given."""
    return {"EARLY": True, "launch_pdl": True} if launches_early(device) else {"EARLY": False}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]  # the compiler reads annotations as its own
    """Let the next kernel start, and wait until all that the kernels before this one store can be seen."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
