"""The main program of a worker process: `python -m longspan.engine.rank.process_rank ADDRESS RANK RANKS PARENT`.

It owns the process's life: it serves the driver at ADDRESS, and ends when told to or when the driver is gone.
"""

from __future__ import annotations

import signal
import sys

from longspan.engine.rank.serving import serve_driver
from longspan.engine.transport.lifetime import end_with_parent


def main(address: str, rank: int, world_size: int, parent: int) -> None:
    """Serve the driver until it says stop or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the whole group: the driver decides what they mean
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    serve_driver(address, rank, world_size, rank)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
