"""A rank's way into the world of processes, and its handles on groups there.

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
    """Join the default process group; ranks meet at a path all of them can open, or at `tcp://host:port`.

    Processes on GPUs, a device each, talk over NCCL.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # a rank may replay a step that its peer runs eagerly
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meet_at if "://" in meet_at else f"file://{meet_at}",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )


def open_group(group: Sequence[int], rank: int, traffic: Traffic, device: torch.device) -> Collectives:
    """This process's handle on a group of ranks that have joined."""
    kind = NcclCollectives if device.type == "cuda" else DistributedCollectives
    return kind(group, rank, traffic, device)


def leave_world() -> None:
    """Leave the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
