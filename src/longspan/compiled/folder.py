"""The folder in which this user's processes keep what they have compiled or measured on this machine.

It owns whose files are read, and that a file is whole; it must not know what is kept.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

_DIGEST_BYTES = 64  # in hexadecimal, behind the content; a library may be followed by anything


class KeptFiles:
    """The files of a folder, which need not exist. Without a folder nothing is kept.

    Files are read only if this user owns them and their folder, and no other may write to either: a library is code.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls) -> KeptFiles:
        """Those of the user that runs this process."""
        try:
            return cls(Path.home() / ".cache" / "longspan" / "kernels")
        except RuntimeError:  # the user has no home
            return cls(None)

    def path(self, name: str) -> Path | None:
        """Where a file is; None if there is none that is whole and this user's."""
        return None if self._folder is None or self.read(name) is None else self._folder / name

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is none that is whole and this user's."""
        if self._folder is None or not (_is_own(self._folder) and _is_own(self._folder / name)):
            return None
        try:
            found = (self._folder / name).read_bytes()
        except OSError:
            return None
        content, digest = found[:-_DIGEST_BYTES], found[-_DIGEST_BYTES:]
        return content if digest == _digest(content) else None

    def keep(self, name: str, content: bytes) -> None:
        """Keep a file, if the folder can be written. A process that reads meanwhile never finds a part of it."""
        if self._folder is None:
            return
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_own(self._folder):
                return
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content + _digest(content))
                Path(temporary).replace(self._folder / name)
            except OSError:
                Path(temporary).unlink(missing_ok=True)
                raise


NOTHING_KEPT = KeptFiles(None)


def _digest(content: bytes) -> bytes:
    return sha256(content).hexdigest().encode()


def _is_own(path: Path) -> bool:
    """Whether this user owns a file or folder, and no other may write to it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
