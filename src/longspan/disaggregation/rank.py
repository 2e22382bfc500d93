"""The transfer thread of a rank.

It owns the choice between sender and receiver by the instance's role; it must not know about plans.
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
    """Start the thread that transfers this rank's pages.

    Call it on the rank's own thread, which then calls the result's methods: ZeroMQ's sockets are not thread-safe.
    """
    part = parts_of(setup)[rank]
    access = PoolAccess(pool, part.heads, setup.device(rank))
    return (PageSender if config.role == "prefill" else PageReceiver)(part, access, config)
