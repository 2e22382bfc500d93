"""How a server behaves beyond its engine: address, key, bounds.

It owns the fields and their checks; it must not import the engine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from longspan.config import require


@dataclass(frozen=True)
class HttpLimits:
    """What one connection may take before its request is complete; the same in the server and the router."""

    max_header_bytes: int = 64 << 10  # of the request line and headers together; of trailers as well; then 431
    header_seconds: float = 30.0  # from the first byte of a request to the end of its headers; then 408
    body_seconds: float = 600.0  # from the end of the headers to the end of the body; then 408
    stall_seconds: float = 30.0  # the window in which a body must keep its pace; then 408
    min_body_rate: int = 1024  # bytes a second, on average over a window
    keep_alive_seconds: int = 60  # an idle connection is closed after these
    linger_seconds: float = 5.0  # a refused client may go on sending for so long, so that it reads the answer
    max_connections: int | None = None  # None: what the process may open (`ulimit -n`), less a reserve

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(value is None or value > 0, name, value, "must be positive", "give more")


@dataclass(frozen=True)
class ServeOptions:
    """Address, key and bounds of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None  # None: the model as it was given
    max_queued_requests: int = 512  # completions that wait beyond those that run
    max_body_bytes: int | None = None  # of one request; None: what the model's longest prompt can need
    request_timeout: float | None = None  # seconds; None for no limit
    tool_call_parser: str | None = None  # None: what the chat template tells
    http: HttpLimits = field(default_factory=HttpLimits)

    def __post_init__(self) -> None:
        require(0 <= self.port < 1 << 16, "port", self.port, "is no port", "give 0..65535; 0 takes a free one")
        require(self.api_key != "", "api_key", "''", "is empty", "leave it out for an open server")
        queued, size, timeout = self.max_queued_requests, self.max_body_bytes, self.request_timeout
        remedy = "0 refuses what cannot run at once"
        require(queued >= 0, "max_queued_requests", queued, "must not be negative", remedy)
        require(size is None or size >= 1, "max_body_bytes", size, "must be positive", "give bytes")
        remedy = "leave it out for no limit"
        require(timeout is None or timeout > 0, "request_timeout", timeout, "must be positive", remedy)

    @property
    def warnings(self) -> list[str]:
        """What a user should know before others reach the server."""
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if loopback or self.api_key:
            return []
        return [f"anybody who reaches {self.host}:{self.port} can use this server; give --api-key"]
