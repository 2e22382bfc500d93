"""Folders that tests share; they go when the session, or the process, ends."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp


@cache
def _session() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="longspan-test-", ignore_cleanup_errors=True)


def shared_folder(name: str) -> Path:
    """A new folder."""
    return Path(mkdtemp(prefix=f"{name}-", dir=_session().name))


def remove_shared_folders() -> None:
    """All of this process."""
    if _session.cache_info().currsize:
        _session().cleanup()
