"""Options of `serve` and `route` for prefill and decode on separate instances.

It owns where the transfer token is read from; the `disaggregation` package uses it.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from longspan.cli.options import flag
from longspan.config import TransferConfig, require
from longspan.config.addresses import is_loopback
from longspan.secret_file import read_secret_file

TOKEN_VARIABLE = "LONGSPAN_TRANSFER_TOKEN"

Role = Annotated[str | None, flag(TransferConfig, "role")]
TransferHost = Annotated[str | None, flag(TransferConfig, "transfer_host")]
TransferPort = Annotated[int, flag(TransferConfig, "transfer_port")]
PrefillPeers = Annotated[str | None, flag(TransferConfig, "prefill_peers")]
TransferTokenFile = Annotated[
    str | None,
    typer.Option(
        "--transfer-token-file",
        help=f"file with the secret that instances and routers share; default: the variable {TOKEN_VARIABLE}",
    ),
]


def read_token(file: str | None) -> str:
    """The transfer token; '' without one. Raises `ConfigError` for a file that cannot be read or is empty."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    remedy = f"write a secret to it, as with `openssl rand -hex 32 > {file}`"
    token = read_secret_file("transfer_token_file", file, remedy).strip()
    require(token != "", "transfer_token_file", file, "is empty", remedy)
    return token


def transfer_config(
    role: str | None, host: str, port: int, prefill_peers: str | None, token_file: str | None
) -> TransferConfig | None:
    """The configuration of a prefill or decode instance; None without a role. Raises `ConfigError`."""
    if role is None:
        for name, value in (("prefill_peers", prefill_peers), ("transfer_token_file", token_file)):
            require(value is None, name, value, "has no effect without a role", "give --role prefill or --role decode")
        return None
    peers = tuple(filter(None, (prefill_peers or "").replace(" ", "").split(",")))
    return TransferConfig(role=role, host=host, port=port, prefill_peers=peers, token=read_token(token_file))


def warnings(config: TransferConfig | None) -> list[str]:
    """Warnings about a configuration that is not protected, or that has no effect."""
    if config is None or config.token:
        return []
    if config.role == "prefill" and not is_loopback(config.host):
        return [
            f"any client that reaches {config.host} can have prompts computed here; "
            "give --transfer-token-file here and to the decode instances"
        ]
    if config.role == "prefill" or config.prefill_peers:
        return []
    return [
        "this decode instance will compute every prompt itself; "
        "give --prefill-peers, or --transfer-token-file here and to `longspan route`"
    ]
