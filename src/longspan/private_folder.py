"""A temporary folder for Unix sockets and files that a process shares with the processes it starts.

It owns the creation and removal of the folder, also after a process was killed; it must not know what is in it.
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
    """A folder that only this user can open.

    It is removed by `cleanup`, or when the object is deleted. If the process was killed, it is removed when any process
    of this user makes the next one. That process recognises it by a lock file in it: the process that made the folder
    holds the lock, and the kernel releases it however that process ends.
    """

    def __init__(self) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        super().__init__(prefix=_PREFIX)
        folder = Path(self.name)
        self._lock = (folder / _NEW_LOCK).open("wb")
        with suppress(OSError):  # on a file system without locks the folder has no lock file, and others leave it alone
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (folder / _NEW_LOCK).rename(folder / _LOCK)  # after locking, so that no process finds it without the lock

    def cleanup(self) -> None:
        """Remove the folder. May be called more than once."""
        super().cleanup()
        self._lock.close()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` whose processes have ended."""
    with suppress(OSError):
        for folder in list(parent.glob(f"{_PREFIX}*")):
            with suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a folder of this user with a lock file that no process has locked. Raises `OSError` for any other."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(file)
