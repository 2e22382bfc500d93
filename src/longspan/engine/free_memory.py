"""Give freed memory back to the system.

It owns the call of the C library, which keeps what is freed, and the reason for it.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_free_memory() -> None:
    """Return what this process has freed, where the C library can (glibc).

    What a start needs only once is 150 MB with SmolLM2: weights before they are packed, and those of a measurement.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
