"""The configuration of an instance that only prefills or only decodes, and transfers KV pages.

It owns the fields and their checks; it must not open connections.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.config.addresses import is_address
from longspan.config.option import OPTION, Option, option
from longspan.errors import ConfigError

ROLE_NAMES = ("prefill", "decode")
_SHORTEST_TOKEN = 16  # characters of the shortest transfer token that is accepted


@dataclass(frozen=True)
class TransferConfig:
    """How an instance sends pages to other instances, or fetches them."""

    role: str = field(metadata={OPTION: Option("prefill or decode, for use with `longspan route`; default: do both")})
    host: str = option(
        "127.0.0.1", "address to listen on for other instances and all ranks; default: --host", name="transfer_host"
    )
    port: int = option(0, "port to listen on for other instances; 0 takes a free one", name="transfer_port")
    # maximum bytes of KV in one message
    block_bytes: int = 1 << 21
    # maximum messages in flight to one rank
    max_blocks: int = 8
    # how long a prefill instance keeps computed pages that no instance fetches
    hold_seconds: float = 120.0
    # how long a decode instance waits for an answer, or for pages that have been computed
    patience_seconds: float = 30.0
    # how long a decode instance waits for a prompt to be computed
    prompt_seconds: float = 600.0
    # whether pages are sent while the rest of the prompt is computed
    overlap: bool = True
    prefill_peers: tuple[str, ...] = option(
        (), "transfer addresses that any client may let this decode instance fetch from: tcp://HOST:PORT,..."
    )
    # the secret that instances and routers share; '' for none. A decode instance accepts sources that are signed with
    # it, and a prefill instance serves only peers that have it
    token: str = field(default="", repr=False)
    # address of the driver's control socket, for the ranks
    control_address: str = ""
    # identifies one start of the instance
    epoch: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLE_NAMES:
            raise ConfigError("role", self.role, "unknown choice", f"use one of {', '.join(ROLE_NAMES)}")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError("transfer_port", self.port, "is not a port", "give 0..65535; 0 takes a free one")
        for name in ("block_bytes", "max_blocks", "hold_seconds", "patience_seconds", "prompt_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive", "leave it out for the default")
        for address in self.prefill_peers:
            if not is_address(address):
                raise ConfigError(
                    "prefill_peers", address, "is not a transfer address", "give tcp://HOST:PORT, separated by commas"
                )
        if self.prefill_peers and self.role != "decode":
            raise ConfigError(
                "prefill_peers", ",".join(self.prefill_peers), f"has no effect on a {self.role} instance",
                "give it to the decode instances",
            )  # fmt: skip
        if self.token and len(self.token) < _SHORTEST_TOKEN:
            raise ConfigError(
                "transfer_token", f"({len(self.token)} characters)", "is too short to be safe",
                f"use {_SHORTEST_TOKEN} or more, as from `openssl rand -hex 32`",
            )  # fmt: skip
