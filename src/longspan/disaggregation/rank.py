"""Opens a rank's side of transfers.

It owns the choice of the thread for a role; it must not know of plans.
"""

from __future__ import annotations

from longspan.attention.pool import KVPool
from longspan.config import TransferConfig
from longspan.disaggregation.handshake import parts_of
from longspan.disaggregation.instance import InstanceSetup
from longspan.disaggregation.pool_access import PoolAccess
from longspan.disaggregation.receiver import PageReceiver
from longspan.disaggregation.sender import PageSender
from longspan.disaggregation.worker import TransferThread


def open_transfer(config: TransferConfig, setup: InstanceSetup, rank: int, pool: KVPool) -> TransferThread:
    """The thread that moves this rank's pages; call it on the rank's own thread."""
    part = parts_of(setup)[rank]
    access = PoolAccess(pool, part.heads, setup.device(rank))
    return (PageSender if config.role == "prefill" else PageReceiver)(part, access, config)
