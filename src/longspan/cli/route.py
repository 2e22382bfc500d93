"""`longspan route`: a router in front of prefill and decode instances.

It owns the options and the messages at start; the router forwards the requests.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from longspan.cli.transfer import TransferTokenFile, read_token
from longspan.server.options import RouteOptions

Prefill = Annotated[list[str], typer.Option("--prefill", help="URL of a prefill instance; may be given several times")]
Decode = Annotated[list[str], typer.Option("--decode", help="URL of a decode instance; may be given several times")]


def route(
    prefill: Prefill, decode: Decode, options: RouteOptions, transfer_token_file: TransferTokenFile = None
) -> None:
    """Serve the OpenAI API through prefill and decode instances, until a signal."""
    import uvicorn
    import uvloop

    from longspan.server.logs import configure
    from longspan.server.router.instances import Instances
    from longspan.server.router.proxy import route as run

    options = options.with_secrets(os.environ)
    instances = Instances(prefill, decode, read_token(transfer_token_file))
    configure(options.log)
    console = Console(stderr=True)
    for warning in options.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)

    def ready(server: uvicorn.Server) -> None:
        opened = server.servers[0].sockets[0].getsockname()[1]
        for line in (
            f"prefill: {', '.join(prefill)}; decode: {', '.join(decode)}",
            f"routing at {options.tls.scheme}://{options.host}:{opened} (API: /v1, instances: /internal/instances)",
        ):
            console.print(line, highlight=False, soft_wrap=True)

    uvloop.run(run(instances, options, ready))
