"""A process that ends with the one that started it, however that one ends.

It owns the watch; it must not know what either process does.
"""

from __future__ import annotations

import os
import time
from threading import Thread

_WATCH_SECONDS = 0.5


def end_with_parent(parent: int) -> None:
    """From now on this process ends within a second of its parent: no orphans, even deep in a collective.

    `parent` is the parent's id as the parent itself gave it: it may be gone by now.
    """
    Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
