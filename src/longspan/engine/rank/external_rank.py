"""The main program of a rank that the user starts: `torchrun ... -m longspan.engine.rank.external_rank ADDRESS`.

It owns the arguments and the exit code. RANK, WORLD_SIZE and LOCAL_RANK are set by launchers of torch.distributed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from longspan.engine.rank.serving import serve_driver
from longspan.errors import ConfigError, LongspanError

_USAGE = 2


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Serve the driver and return the exit code.

    0: the driver stopped the rank. 1: the rank failed, and a launcher may start it again. 2: it cannot be started with
    these arguments.
    """
    try:
        if len(arguments) != 1:
            raise ConfigError("driver", " ".join(arguments), "is not one address", "give the driver's tcp://host:port")
        rank, world_size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
        local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
        return int(not serve_driver(arguments[0], rank, world_size, local))
    except LongspanError as error:
        print(f"longspan: error: {error}", file=sys.stderr)
        return _USAGE


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError(name, text or "(unset)", "is not a number", "start the ranks with torchrun, or set it")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
