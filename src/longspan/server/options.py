"""How a server behaves beyond its engine: address, key, bounds.

It owns the fields and their checks; it must not import the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.config import require


@dataclass(frozen=True)
class ServeOptions:
    """`max_queued_requests` completions wait beyond those that run; `max_body_bytes` bounds a request's body;
    `request_timeout` is in seconds, None for no limit; `tool_call_parser` None is what the chat template tells."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_queued_requests: int = 512
    max_body_bytes: int = 64 << 20
    request_timeout: float | None = None
    tool_call_parser: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.port < 1 << 16, "port", self.port, "is no port", "give 0..65535; 0 takes a free one")
        require(self.api_key != "", "api_key", "''", "is empty", "leave it out for an open server")
        require(
            self.max_queued_requests >= 0, "max_queued_requests", self.max_queued_requests, "must not be negative",
            "0 refuses what cannot run at once",
        )  # fmt: skip
        require(self.max_body_bytes >= 1, "max_body_bytes", self.max_body_bytes, "must be positive", "give bytes")
        if self.request_timeout is not None:
            require(
                self.request_timeout > 0, "request_timeout", self.request_timeout, "must be positive",
                "leave it out for no limit",
            )  # fmt: skip

    @property
    def warnings(self) -> list[str]:
        """What a user should know before others reach the server."""
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if loopback or self.api_key:
            return []
        return [f"anybody who reaches {self.host}:{self.port} can use this server; give --api-key"]
