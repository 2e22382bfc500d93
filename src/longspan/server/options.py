"""Options of the server and the router that are not the engine's: address, key, limits.

It owns the fields and their checks; it must not import the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from longspan.config import parse_bytes, require, require_choice
from longspan.config.addresses import is_loopback
from longspan.config.option import OPTION, Option, option
from longspan.server.keys import KEY_VARIABLE, NamedKey, read_keys

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def parse_origins(field: str, text: str) -> tuple[str, ...]:
    """`https://a.example,http://localhost:3000`, or `*`. Raises `ConfigError`."""
    origins = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in origins:
        known = origin == "*" or re.fullmatch(r"https?://[^/?#\s]+", origin) is not None
        require(known, field, origin, "is no origin", "write it as https://HOST or https://HOST:PORT, without a path")
    return origins


@dataclass(frozen=True)
class HttpLimits:
    """Limits on connections, in the server and the router alike. Comments give the HTTP status beyond a limit."""

    max_header_bytes: int = 64 << 10  # of the request line and headers together, and of trailers; then 431
    header_seconds: float = 30.0  # from the first byte of a request to the end of its headers; then 408
    body_seconds: float = 600.0  # from the end of the headers to the end of the body; then 408
    stall_seconds: float = 30.0  # the window over which `min_body_rate` is averaged; then 408
    min_body_rate: int = 1024  # bytes of a body that must arrive each second, on average over a window
    keep_alive_seconds: int = 60  # an idle connection is closed after these
    linger_seconds: float = 5.0  # how long a refused client may go on sending before the connection is closed
    max_connections: int | None = None  # None: the open files of the process (`ulimit -n`), less a reserve

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(value is None or value > 0, name, value, "must be positive", "give more")


@dataclass(frozen=True)
class LogOptions:
    """What a server or router writes to its log."""

    level: str = option("info", f"lines from this level on are logged: {', '.join(LOG_LEVELS)}", name="log_level")
    disable_access: bool = option(
        False, "no line for each request; those of status 5xx stay", name="disable_uvicorn_access_log"
    )

    def __post_init__(self) -> None:
        require_choice("log_level", self.level, LOG_LEVELS)


@dataclass(frozen=True)
class TlsOptions:
    """PEM files for HTTPS; plain HTTP without them. They are read by `tls_context`."""

    certfile: str | None = option(
        None, "certificate, or chain, of an HTTPS server; default: plain HTTP", name="ssl_certfile"
    )
    keyfile: str | None = option(None, "its key, unless the certificate's file holds it", name="ssl_keyfile")
    ca_certs: str | None = option(
        None, "authorities: a client must have a certificate of one of them", name="ssl_ca_certs"
    )

    @property
    def scheme(self) -> str:
        """Of the server's URL."""
        return "http" if self.certfile is None else "https"


@dataclass(frozen=True)
class ListenOptions:
    """The address that a server or router listens on, and the key of its clients."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every one")
    port: int = option(8000, "0 takes a free one")
    api_key: str | None = field(
        default=None, repr=False,
        metadata={OPTION: Option("key that clients must send; every user of the machine can see it")},
    )  # fmt: skip
    api_key_file: str | None = option(
        None, f"file of keys that clients may send, name:key a line; default: the variable {KEY_VARIABLE}, if any"
    )
    # what was read there
    named_keys: tuple[NamedKey, ...] = ()
    tls: TlsOptions = field(default_factory=TlsOptions)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        require(0 <= self.port < 1 << 16, "port", self.port, "is no port", "give 0..65535; 0 takes a free one")
        require(self.api_key != "", "api_key", "''", "is empty", "leave it out for an open server")

    @property
    def keys(self) -> tuple[NamedKey, ...]:
        """All that a client may send; none for an open server."""
        return self.named_keys if self.api_key is None else (NamedKey("--api-key", self.api_key), *self.named_keys)

    def with_secrets(self, environment: Mapping[str, str]) -> Self:
        """With the keys of the file, or of the environment if no option names any. Raises `ConfigError`."""
        if self.api_key is not None and self.api_key_file is None:
            return self
        return replace(self, named_keys=read_keys(self.api_key_file, environment))

    @property
    def warnings(self) -> list[str]:
        """What a user should know before others reach the server."""
        if is_loopback(self.host) or self.keys:
            return []
        return [f"anybody who reaches {self.host}:{self.port} can use this server; give --api-key-file"]


@dataclass(frozen=True)
class RouteOptions(ListenOptions):
    """Options of a router. Its instances take the same keys, and it asks them with the first one."""

    max_body_bytes: int = option(
        64 << 20, "largest request body; k, M, G are 1024-based", parse=parse_bytes, text="64M"
    )
    wait_seconds: float = option(60.0, "seconds the instances may take to start", name="wait")
    http: HttpLimits = field(default_factory=HttpLimits)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.wait_seconds >= 0, "wait", self.wait_seconds, "must not be negative", "give seconds")


@dataclass(frozen=True)
class ServeOptions(ListenOptions):
    """Options of a server."""

    served_model_name: str | None = option(None, "default: MODEL as given")
    max_queued_requests: int = option(512, "completions that may wait beyond max_num_seqs; then 429")
    max_body_bytes: int | None = option(
        None,
        "largest request body; k, M, G are 1024-based; default: what the longest prompt can need, 2M to 64M",
        parse=parse_bytes,
    )
    request_timeout: float | None = option(None, "seconds a request may take; default: no limit")
    tool_call_parser: str | None = option(None, "form of tool calls; default: what the chat template tells")
    chat_template: str | None = option(
        None, "file of a chat template in place of the model's, or the template in one line"
    )
    trust_request_chat_template: bool = option(
        False, "let requests bring a chat template: it runs in a sandbox, and may still take long"
    )
    generation_config: str = option(
        "vllm", "where temperature, top_p, top_k, min_p and repetition_penalty of requests that give none come from: "
        "auto (the model's generation_config.json), a folder with one, or vllm (nowhere)",
    )  # fmt: skip
    allowed_origins: tuple[str, ...] = option(
        (), "web pages of these origins may call the server from a browser, as in https://a.example,https://b.example; "
        "* is all; default: none", parse=parse_origins, text=None,
    )  # fmt: skip
    cache_salt_by_key: bool = option(
        False, "clients of different API keys share no cached prefix: the key's name begins the cache_salt"
    )
    disable_log_stats: bool = option(False, "no line of throughput every ten seconds in the log")
    http: HttpLimits = field(default_factory=HttpLimits)

    def with_secrets(self, environment: Mapping[str, str]) -> Self:
        """See `ListenOptions`."""
        found = super().with_secrets(environment)
        remedy = "give --api-key-file with a line name:key for each client"
        require(not self.cache_salt_by_key or bool(found.keys), "cache_salt_by_key", True, "there are no keys", remedy)
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        queued, size, timeout = self.max_queued_requests, self.max_body_bytes, self.request_timeout
        remedy = "0 refuses what cannot run at once"
        require(queued >= 0, "max_queued_requests", queued, "must not be negative", remedy)
        require(size is None or size >= 1, "max_body_bytes", size, "must be positive", "give bytes")
        remedy = "leave it out for no limit"
        require(timeout is None or timeout > 0, "request_timeout", timeout, "must be positive", remedy)
