"""What makes an engine one side of a pair: its role, its address, its bounds.

It owns the fields and their checks; pure, it must not open anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.errors import ConfigError

ROLE_NAMES = ("prefill", "decode")


@dataclass(frozen=True)
class TransferConfig:
    """How an instance of one `role` hands pages to others, or takes them.

    `host` and `port` are where it listens for other instances (0: a free port). A message carries `block_bytes` of KV
    at most, and a rank has `max_blocks` on their way to it. A prefill instance keeps computed pages for `hold_seconds`
    if nobody fetches them; a decode instance waits `patience_seconds` for an answer, or for pages that are computed.
    Without `overlap` pages leave when the whole prompt is computed. `mailbox` and `life` are for the ranks: where their
    driver listens, and which start of the instance they belong to.
    """

    role: str
    host: str = "127.0.0.1"
    port: int = 0
    block_bytes: int = 1 << 21
    max_blocks: int = 8
    hold_seconds: float = 120.0
    patience_seconds: float = 30.0
    overlap: bool = True
    mailbox: str = ""
    life: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLE_NAMES:
            raise ConfigError("role", self.role, "unknown choice", f"use one of {', '.join(ROLE_NAMES)}")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError("transfer_port", self.port, "is no port", "give 0..65535; 0 takes a free one")
        for name in ("block_bytes", "max_blocks", "hold_seconds", "patience_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive", "leave it out for the default")
