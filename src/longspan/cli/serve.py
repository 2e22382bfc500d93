"""`longspan serve`: an OpenAI-compatible server.

It owns the options and what is said at start; serving is the server's.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from longspan.cli import transfer
from longspan.cli.options import parse_bytes
from longspan.config import EngineConfig

Host = Annotated[str, typer.Option("--host", help="address to listen on; 0.0.0.0 is every one")]
Port = Annotated[int, typer.Option("--port", help="0 takes a free one")]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="key that clients must send")]
ServedName = Annotated[str | None, typer.Option("--served-model-name", help="default: MODEL as given")]
Queue = Annotated[
    int, typer.Option("--max-queued-requests", help="completions that may wait beyond --max-num-seqs; then 429")
]
BodyBytes = Annotated[str, typer.Option("--max-body-bytes", help="largest request body; k, M, G are 1024-based")]
ModelBodyBytes = Annotated[
    str | None,
    typer.Option(
        "--max-body-bytes",
        help="largest request body; k, M, G are 1024-based; default: what the longest prompt can need, 2M to 64M",
    ),
]
Timeout = Annotated[float | None, typer.Option("--request-timeout", help="seconds a request may take; default: any")]
ToolParser = Annotated[
    str | None, typer.Option("--tool-call-parser", help="form of tool calls; default: what the chat template tells")
]


def serve(
    config: EngineConfig,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    served_model_name: ServedName = None,
    max_queued_requests: Queue = 512,
    max_body_bytes: ModelBodyBytes = None,
    request_timeout: Timeout = None,
    tool_call_parser: ToolParser = None,
    role: transfer.Role = None,
    transfer_host: transfer.TransferHost = None,
    transfer_port: transfer.TransferPort = 0,
    prefill_peers: transfer.PrefillPeers = None,
    transfer_token_file: transfer.TransferTokenFile = None,
) -> None:
    """Serve a model until a signal; the first one drains, the second stops at once."""
    import uvloop

    from longspan.cli.generate import kv_cache_line
    from longspan.server.options import ServeOptions
    from longspan.server.run import Server, make_service
    from longspan.server.run import serve as run

    options = ServeOptions(
        host, port, api_key, served_model_name, max_queued_requests,
        None if max_body_bytes is None else parse_bytes("max_body_bytes", max_body_bytes),
        request_timeout, tool_call_parser,
    )  # fmt: skip
    pairing = transfer.transfer_config(role, transfer_host or host, transfer_port, prefill_peers, transfer_token_file)
    config = replace(config, transfer=pairing)
    logging.basicConfig(level=logging.WARNING, format="longspan: %(message)s")
    console = Console(stderr=True)
    for warning in (*options.warnings, *transfer.warnings(pairing)):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    with console.status("starting"):
        service = make_service(config, options)

    def ready(server: Server) -> None:
        gc.collect()
        gc.freeze()  # collections during a large body need not walk all that has been loaded
        setup = service.engine.setup
        for line in (
            kv_cache_line(setup), *setup.notes,
            f"serving {service.model} at http://{host}:{server.port} (API: /v1, live page: /, metrics: /metrics)",
        ):  # fmt: skip
            console.print(line, highlight=False, soft_wrap=True)

    uvloop.run(run(service, ready))
