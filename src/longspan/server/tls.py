"""TLS of a server or router: its certificate, its key, and the authority of its clients' certificates.

It owns reading and checking the files; uvicorn speaks the protocol.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from longspan.config import require
from longspan.errors import ConfigError
from longspan.server.options import TlsOptions


def tls_context(options: TlsOptions) -> ssl.SSLContext | None:
    """What connections are encrypted with; None without a certificate. Raises `ConfigError` for files that are bad."""
    certificate, key, authority = options.certfile, options.keyfile, options.ca_certs
    if certificate is None:
        for name, value in (("ssl_keyfile", key), ("ssl_ca_certs", authority)):
            require(value is None, name, value, "is given without a certificate", "give --ssl-certfile too")
        return None
    for name, file in (("ssl_certfile", certificate), ("ssl_keyfile", key), ("ssl_ca_certs", authority)):
        if file is not None:
            _check_readable(name, file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except (ssl.SSLError, ValueError) as error:
        where = "ssl_certfile" if key is None else "ssl_keyfile"
        raise ConfigError(
            where,
            certificate if key is None else key,
            f"holds no key of the certificate ({_said(error)})",
            "give PEM files: a certificate, or a chain of them, and its key, which has no password",
        ) from error
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except ssl.SSLError as error:
            raise ConfigError(
                "ssl_ca_certs", authority, f"holds no certificate ({_said(error)})", "give a PEM file"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(name: str, file: str) -> None:
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(name, file, f"cannot be read ({error.strerror})", "give a PEM file") from error


def _refuse_password() -> str:
    """Called for a key that has a password; otherwise OpenSSL would ask for it on the terminal."""
    raise ValueError("it has a password")


def _said(error: Exception) -> str:
    reason = error.reason or "no PEM file" if isinstance(error, ssl.SSLError) else str(error)
    return reason.replace("_", " ").lower()
