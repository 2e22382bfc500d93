"""The main program of a rank's process: `python -m longspan.engine.rank.process_rank ADDRESS RANK RANKS PARENT`.

It owns signals and the end of the process: it serves the driver at ADDRESS until it is told to stop or the driver ends.
"""

from __future__ import annotations

import signal
import sys

from longspan.engine.rank.serving import serve_driver
from longspan.engine.transport.lifetime import end_with_parent


def main(address: str, rank: int, world_size: int, parent: int) -> None:
    """Serve the driver until it stops this rank or ends itself."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the driver acts on them
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    serve_driver(address, rank, world_size, rank)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
