"""The process group of all ranks: how a process joins and leaves it, and opens smaller groups.

It owns the choice of the transport, gloo on CPUs and NCCL on GPUs; it must not know what is sent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from longspan.parallel.collectives import Collectives, Traffic
from longspan.parallel.distributed import DistributedCollectives
from longspan.parallel.nccl import NcclCollectives

_TIMEOUT = timedelta(minutes=30)


def join_world(rank: int, world_size: int, meet_at: str, device: torch.device) -> None:
    """Join torch.distributed's default process group: NCCL if `device` is a GPU, else gloo.

    `meet_at` is `tcp://host:port`, or the path of a file that all ranks can open.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # a rank may replay the CUDA graph of a step that a peer runs without a graph
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meet_at if "://" in meet_at else f"file://{meet_at}",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )


def open_group(group: Sequence[int], rank: int, traffic: Traffic, device: torch.device) -> Collectives:
    """This process's handle on a group of ranks, all of which have joined the world."""
    kind = NcclCollectives if device.type == "cuda" else DistributedCollectives
    return kind(group, rank, traffic, device)


def leave_world() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
