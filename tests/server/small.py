"""A server and a router as `longspan serve` and `longspan route` run them, with limits so small that attacks are quick.

The command line has no options for the limits on connections, so these call what its commands call.
"""

from __future__ import annotations

import resource
import socket

from longspan.cli import route as cli_route
from longspan.cli import serve as cli_serve
from longspan.config import CacheConfig, CostConstants, EngineConfig, SchedulerConfig
from longspan.server import listening
from longspan.server.options import HttpLimits, RouteOptions, ServeOptions

LIMITS = HttpLimits(
    max_header_bytes=8 << 10, header_seconds=5.0, stall_seconds=1.0, min_body_rate=1000, linger_seconds=0.5,
    max_connections=40,
)  # fmt: skip
MAX_BODY = 16 << 20
SEND_BUFFER = 16 << 10  # the kernel takes megabytes for a client that does not read, and the server notices none
_FILES = 200  # a process that lets everybody in soon has no file left


def _make_small() -> None:
    """Few open files, and small buffers of the sockets that connections come from."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    bound = listening._bound

    def small(family: int, address: tuple[object, ...]) -> socket.socket:
        opened = bound(family, address)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        return opened

    listening._bound = small


def server(model: str) -> None:
    """A decode instance, which a router takes; it knows no prefill instance, so it computes every prompt itself."""
    _make_small()
    config = EngineConfig(
        model, executor="threads", num_threads=1, cost=CostConstants(),
        cache=CacheConfig(page_size=4, memory_bytes=1 << 20),
        scheduler=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=16, local_context=8),
    )  # fmt: skip
    options = ServeOptions(port=0, served_model_name="tiny", max_body_bytes=MAX_BODY, http=LIMITS)
    cli_serve.serve(config, options, role="decode")


def router(url: str) -> None:
    """A router in front of it."""
    _make_small()
    cli_route.route([], [url], RouteOptions(port=0, max_body_bytes=MAX_BODY, http=LIMITS))
