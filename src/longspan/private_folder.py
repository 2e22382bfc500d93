"""A folder of one process, for its sockets and the files it shares with those it starts.

It owns the folder's life, whatever ends the process; it must not know what is in it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "longspan-"
_LOCK, _NEW_LOCK = "lock", "lock.new"


class PrivateFolder(tempfile.TemporaryDirectory[str]):
    """A folder that only this user can open. It goes with `cleanup`, or with the object, or, if the process was killed,
    when any process of this user makes the next one.

    The process holds a lock on a file in it, which the kernel takes back however the process ends.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        super().__init__(prefix=_PREFIX)
        folder = Path(self.name)
        self._lock = (folder / _NEW_LOCK).open("wb")
        with suppress(OSError):  # a file system without locks: nobody sweeps the folder then
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (folder / _NEW_LOCK).rename(folder / _LOCK)  # so that it is never seen unlocked

    def cleanup(self) -> None:
        """Remove it; safe to call again."""
        super().cleanup()
        self._lock.close()


def _sweep(parent: Path) -> None:
    """Remove the folders in `parent` whose processes are gone."""
    with suppress(OSError):
        for folder in list(parent.glob(f"{_PREFIX}*")):
            with suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    """Only a folder of this user with a lock that nobody holds."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(file)
