"""Run a server: engine, tokenizer, sockets and signals.

It owns start and shutdown; the application serves requests in between.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from longspan.config import EngineConfig, require_choice
from longspan.engine.setup import EngineSetup, resolve
from longspan.server.app import Service, build_app
from longspan.server.async_engine import AsyncEngine
from longspan.server.listening import open_sockets
from longspan.server.logs import ThroughputLog
from longspan.server.metrics import Metrics
from longspan.server.options import ServeOptions
from longspan.server.protocol import HttpConfig, announce
from longspan.server.served import ServedModel, generation_defaults, read_template
from longspan.server.text import Text
from longspan.server.tls import tls_context
from longspan.server.tools import TOOL_FORMATS, detect_format
from longspan.weights.tokenizer import check_template, load_tokenizer

_LAST_BYTES_SECONDS = 10.0
_LOG = logging.getLogger("longspan.server")


class Server(uvicorn.Server):
    """uvicorn's server. The first signal refuses new requests and waits for those in flight; a second one stops."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine) -> None:
        super().__init__(config)
        self._engine = engine

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`."""
        if self.should_exit:
            self._engine.give_up()
            self.force_exit = True
        else:
            self._engine.drain()
            waiting = len(self._engine.output_processor)
            _LOG.warning("%s: %d requests in flight end first; again to stop now", signal.Signals(sig).name, waiting)
        self.should_exit = True


def make_service(config: EngineConfig, options: ServeOptions) -> Service:
    """Build everything except the core, which `serve` starts. Raises `ConfigError` or `ModelError`."""
    setup = resolve(config)
    tokenizer = load_tokenizer(setup.source)
    if options.chat_template is not None and tokenizer is not None:
        tokenizer.chat_template = read_template(options.chat_template)
    else:
        check_template(tokenizer, setup.source)
    model = options.served_model_name or config.model
    metrics = Metrics(model, setup.pages_per_shard, _cache_facts(setup))
    throughput = None if options.disable_log_stats else ThroughputLog(metrics)
    engine = AsyncEngine(setup, tokenizer, metrics, options.max_queued_requests, options.request_timeout, throughput)
    text = Text(tokenizer, setup.max_model_len)
    served = ServedModel(
        model, _tool_format(options, tokenizer), generation_defaults(options.generation_config, setup.source.path),
        options.trust_request_chat_template,
    )  # fmt: skip
    return Service(engine, text, options, served, time.monotonic())


async def serve(
    service: Service, on_ready: Callable[[Server], None], sockets: list[socket.socket] | None = None
) -> None:
    """Serve until a signal. `on_ready` is called once every rank is ready and the port is open.

    `sockets` are those of `open_sockets`; None opens them first.
    """
    tls = tls_context(service.options.tls)
    sockets = open_sockets(service.options) if sockets is None else sockets
    with _ended_by_sigterm():
        await service.engine.start()
    options = service.options
    config = HttpConfig(build_app(service), options.host, options.port, options.http, tls)
    server = Server(config, service.engine)
    tasks = [asyncio.create_task(announce(server, on_ready)), asyncio.create_task(_end_drain(server, service.engine))]
    try:
        await server.serve(sockets)
    finally:
        for task in tasks:
            task.cancel()
        await service.engine.close()


async def _end_drain(server: Server, engine: AsyncEngine) -> None:
    """Force the exit some seconds after the last request: a client that does not read must not prevent it."""
    while not (server.should_exit and not len(engine.output_processor)):
        await asyncio.sleep(0.2)
    await asyncio.sleep(_LAST_BYTES_SECONDS)
    server.force_exit = True


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within this context SIGTERM cancels the current task, so that a start ends cleanly. Later it drains."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    on_main_thread = threading.current_thread() is threading.main_thread() and task is not None
    if on_main_thread and task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        if on_main_thread:
            loop.remove_signal_handler(signal.SIGTERM)


def _cache_facts(setup: EngineSetup) -> dict[str, object]:
    """The cache's options under vLLM's names."""
    cache = setup.config.cache
    return {
        "block_size": cache.page_size, "num_gpu_blocks": sum(setup.pages_per_shard), "cache_dtype": cache.dtype,
        "enable_prefix_caching": cache.enable_prefix_caching,
    }  # fmt: skip


def _tool_format(options: ServeOptions, tokenizer: object) -> str | None:
    if options.tool_call_parser is None:
        template = getattr(tokenizer, "chat_template", None)
        return detect_format(template) if isinstance(template, str) else None
    require_choice("tool_call_parser", options.tool_call_parser, TOOL_FORMATS)
    return options.tool_call_parser
