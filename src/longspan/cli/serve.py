"""`longspan serve`: an OpenAI-compatible server.

It owns the options and the messages at start; the `server` package serves.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace

import typer
from rich.console import Console

from longspan.cli import transfer
from longspan.config import EngineConfig, TransferConfig
from longspan.server.options import ServeOptions


def serve(
    config: EngineConfig,
    options: ServeOptions,
    role: transfer.Role = None,
    transfer_host: transfer.TransferHost = None,
    transfer_port: transfer.TransferPort = TransferConfig.port,
    prefill_peers: transfer.PrefillPeers = None,
    transfer_token_file: transfer.TransferTokenFile = None,
) -> None:
    """Serve a model until a signal. The first signal lets running requests finish, the second stops at once."""
    import asyncio

    import uvloop

    from longspan.cli.generate import kv_cache_line
    from longspan.server.listening import open_sockets
    from longspan.server.logs import configure
    from longspan.server.run import Server, make_service
    from longspan.server.run import serve as run
    from longspan.server.tls import tls_context

    pairing = transfer.transfer_config(
        role, transfer_host or options.host, transfer_port, prefill_peers, transfer_token_file
    )
    config, options = replace(config, transfer=pairing, read_vocabulary_ahead=True), options.with_secrets(os.environ)
    configure(options.log)
    tls_context(options.tls)  # bad files are noticed before the model is loaded
    console = Console(stderr=True)
    for warning in (*options.warnings, *transfer.warnings(pairing)):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    sockets = open_sockets(options)  # before the model is loaded, so that a busy port is reported early
    with console.status("starting"):
        service = make_service(config, options)

    def ready(server: Server) -> None:
        gc.collect()
        gc.freeze()  # later collections do not walk the objects that exist now
        setup = service.engine.setup
        for line in (
            kv_cache_line(setup), *setup.notes,
            f"serving {service.model} at {options.tls.scheme}://{options.host}:{server.port} "
            "(API: /v1, live page: /, metrics: /metrics)",
            *([f"keys: {', '.join(one.name for one in options.keys)}"] if options.keys else ()),
        ):  # fmt: skip
            console.print(line, highlight=False, soft_wrap=True)

    try:
        uvloop.run(run(service, ready, sockets))
    except asyncio.CancelledError:  # by a signal before the server was up
        raise typer.Abort from None
