"""What makes an engine one side of a pair: its role, its address, its peers, its bounds.

It owns the fields and their checks; pure, it must not open anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.config.addresses import is_address
from longspan.config.option import OPTION, Option, option
from longspan.errors import ConfigError

ROLE_NAMES = ("prefill", "decode")
_SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class TransferConfig:
    """How an instance hands pages to others, or takes them."""

    role: str = field(
        metadata={OPTION: Option("prefill or decode: one side of a pair, see `longspan route`; default: both")}
    )
    host: str = option("127.0.0.1", "address for other instances and all ranks; default: --host", name="transfer_host")
    port: int = option(0, "port for other instances; 0 takes a free one", name="transfer_port")
    # the most bytes of KV in one message, and the most messages on their way to one rank
    block_bytes: int = 1 << 21
    max_blocks: int = 8
    # a prefill instance keeps computed pages so long if nobody fetches them
    hold_seconds: float = 120.0
    # a decode instance waits so long for an answer, or for pages that are computed; and so long for a prompt to be
    # computed, without any page of it
    patience_seconds: float = 30.0
    prompt_seconds: float = 600.0
    # whether pages leave while the rest of the prompt is computed
    overlap: bool = True
    prefill_peers: tuple[str, ...] = option(
        (), "transfer addresses a decode instance may use, whoever asks for it: tcp://HOST:PORT,..."
    )
    # the secret that instances and routers share; '' for none. A decode instance believes what is signed with it, a
    # prefill instance hears only who has it
    token: str = field(default="", repr=False)
    # for the ranks: where their driver listens, and which start of the instance they belong to
    control_address: str = ""
    epoch: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLE_NAMES:
            raise ConfigError("role", self.role, "unknown choice", f"use one of {', '.join(ROLE_NAMES)}")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError("transfer_port", self.port, "is no port", "give 0..65535; 0 takes a free one")
        for name in ("block_bytes", "max_blocks", "hold_seconds", "patience_seconds", "prompt_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive", "leave it out for the default")
        for address in self.prefill_peers:
            if not is_address(address):
                raise ConfigError(
                    "prefill_peers", address, "is no transfer address", "give tcp://HOST:PORT, with commas between them"
                )
        if self.prefill_peers and self.role != "decode":
            raise ConfigError(
                "prefill_peers", ",".join(self.prefill_peers), f"means nothing to a {self.role} instance",
                "give it to the decode instances",
            )  # fmt: skip
        if self.token and len(self.token) < _SHORTEST_TOKEN:
            raise ConfigError(
                "transfer_token", f"({len(self.token)} characters)", "can be guessed",
                f"take {_SHORTEST_TOKEN} or more, as from `openssl rand -hex 32`",
            )  # fmt: skip
