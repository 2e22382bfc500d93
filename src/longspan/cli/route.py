"""`longspan route`: one address for prefill and decode instances.

It owns the options and what is said at start; forwarding is the router's.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.console import Console

from longspan.cli.options import parse_bytes
from longspan.cli.serve import ApiKey, BodyBytes, Host, Port
from longspan.cli.transfer import TransferTokenFile, read_token
from longspan.config import require

Prefill = Annotated[list[str], typer.Option("--prefill", help="URL of a prefill instance; again for more")]
Decode = Annotated[list[str], typer.Option("--decode", help="URL of a decode instance; again for more")]
Wait = Annotated[float, typer.Option("--wait", help="seconds the instances may take to start")]


def route(
    prefill: Prefill,
    decode: Decode,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    max_body_bytes: BodyBytes = "64M",
    wait: Wait = 60.0,
    transfer_token_file: TransferTokenFile = None,
) -> None:
    """Serve OpenAI's API through prefill and decode instances until a signal."""
    import uvicorn
    import uvloop

    from longspan.server.router.instances import Instances
    from longspan.server.router.proxy import RouteOptions
    from longspan.server.router.proxy import route as run

    require(wait >= 0, "wait", wait, "must not be negative", "give seconds")
    require(0 <= port < 1 << 16, "port", port, "is no port", "give 0..65535; 0 takes a free one")
    instances = Instances(prefill, decode, read_token(transfer_token_file))
    options = RouteOptions(host, port, api_key, wait, parse_bytes("max_body_bytes", max_body_bytes))
    logging.basicConfig(level=logging.WARNING, format="longspan: %(message)s")
    console = Console(stderr=True)

    def ready(server: uvicorn.Server) -> None:
        opened = server.servers[0].sockets[0].getsockname()[1]
        for line in (
            f"prefill: {', '.join(prefill)}; decode: {', '.join(decode)}",
            f"routing at http://{host}:{opened} (API: /v1, instances: /internal/instances)",
        ):
            console.print(line, highlight=False, soft_wrap=True)

    uvloop.run(run(instances, options, ready))
