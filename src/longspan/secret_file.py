"""Reads files that hold secrets: API keys and the transfer token.

It owns the error for a file that cannot be read; it must not know what the text means.
"""

from __future__ import annotations

from pathlib import Path

from longspan.errors import ConfigError


def read_secret_file(field: str, file: str, remedy: str) -> str:
    """The text of a file. Raises `ConfigError` for the option `field` if it cannot be read or is not UTF-8.

    The error names the file and shows nothing of its text.
    """
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(field, file, f"cannot be read ({type(error).__name__})", remedy) from error
