"""Launches the kernel of `latent.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.attention.backends.triton.config import FUSED
from longspan.attention.backends.triton.latent import latent_kernel
from longspan.attention.backends.triton.plan import ITEM_FIELDS, WorkPlan
from longspan.attention.state import AttentionState
from longspan.early_launch import early_options
from longspan.parallel.heads import HeadBlock


def launch_latents(
    q: Tensor,
    rows: Tensor,
    block: HeadBlock,
    scale: float,
    plan: WorkPlan,
    whole: AttentionState,
    part_out: Tensor,
    part_lse: Tensor,
) -> None:
    """Compute the items of one block of `whole` or of the partial results `part_out` [P, 1, 64, 512] and `part_lse`.

    q is [T, Hq, 576], `rows` the latents [S, 576] of the block's KV head. `scale` is that of scores times log2(e).
    """
    room = plan.capacity
    latent_kernel[(room.adjacent + room.gathered,)](
        plan.adjacent, plan.gathered, room.adjacent, plan.bounds, plan.index, q, rows,
        whole.out, whole.lse, part_out, part_lse, q.stride()[:2],
        (whole.out.stride(0), whole.out.stride(1), whole.lse.stride(0)), block.q_start, block.group, scale,
        STRIDE=rows.stride(0), GATHERED=room.gathered > 0, FIELDS=ITEM_FIELDS, **early_options(q.device), num_warps=4,
        enable_fp_fusion=FUSED,
    )  # fmt: skip
