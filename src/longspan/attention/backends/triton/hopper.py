"""Where the kernel of `latent.py` can be used: on which GPUs, with which versions of Triton, and for which latents.

Its language, Gluon, is experimental, and the kernel has no registers to spare. So versions of Triton are named one by
one, once one has compiled the kernel without spills.
"""

from __future__ import annotations

from importlib import import_module

import torch

from longspan.attention.backends.base import BackendShape, half_precision_problem

_CAPABILITY = 9  # major number of Hopper's compute capability; other GPUs have other matrix instructions
VERSIONS = ("3.6", "3.7", "3.8")  # of Triton; 3.9 spills 80 bytes a thread
_WIDTHS = (576, 512)  # elements of a latent, and of its value


def problem_of_latent_kernel(capability: int) -> str | None:
    """Why the kernel cannot be used on a GPU of this compute capability (its major number); None if it can."""
    import triton

    if capability != _CAPABILITY or torch.version.hip:
        return f"is for compute capability {_CAPABILITY}.x"
    if triton.knobs.runtime.interpret:
        return "cannot be interpreted"
    if not triton.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        return f"was tried with Triton {', '.join(VERSIONS)}, not with {triton.__version__}"
    try:
        import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as problem:
        return f"needs Gluon: {problem}"
    return None


def kernel_of_latents(shape: BackendShape) -> str | None:
    """What computes many rows of a model's latents on Hopper, for people; None without latents or on another GPU."""
    if shape.kv_factor != 1 or shape.capability != _CAPABILITY:
        return None
    problem = half_precision_problem(shape)
    if (shape.head_dim, shape.value_dim) != _WIDTHS:
        problem = f"reads latents of 512 + 64 elements, not of {shape.value_dim} + {shape.head_dim - shape.value_dim}"
    problem = problem or problem_of_latent_kernel(shape.capability)
    if problem:
        return f"no latents by its kernel for Hopper, which {problem}"
    return "64 and more rows of latents by its kernel for Hopper"
