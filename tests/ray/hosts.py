"""Several hosts on one machine: network namespaces, each with an address, connected by a bridge.

They share files and process ids with this machine, but no network.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path

_SWITCHES = count()
_NETWORK = 0x40000000  # CLONE_NEWNET


@dataclass
class Host:
    """A network namespace, and the programs that run in it."""

    name: str
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start a program on the host. It runs until it ends or the host is killed."""
        there = ["ip", "netns", "exec", self.name, *command]
        with log.open("ab") as output:
            self.processes.append(
                subprocess.Popen(
                    there, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}
                )
            )

    def threads(self, number: int) -> ThreadPoolExecutor:
        """Threads of this process that use the host's network."""
        return ThreadPoolExecutor(number, initializer=_enter, initargs=(self.name,))

    @property
    def process_ids(self) -> list[int]:
        """Ids of all processes on the host."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Kill all processes on the host."""
        deadline = time.monotonic() + 10
        while (pids := self.process_ids) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                process.poll()
        for process in self.processes:
            process.wait(10)


def _enter(name: str) -> None:
    with Path(f"/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout


@cache
def why_not() -> str | None:
    """Why hosts cannot be made on this machine; None if they can."""
    name = f"longspan-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "p0", "type", "veth", "peer", "name", "p1")
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces are not permitted ({error})"
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            _ip("netns", "del", name)
    return None


@contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """Hosts that reach each other and nothing else. At the end of the block they are killed and removed."""
    prefix = f"longspan-{os.getpid()}-{next(_SWITCHES)}"
    switch = f"{prefix}-switch"
    made = [Host(f"{prefix}-host{index}", f"10.77.0.{index + 1}") for index in range(number)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for index, host in enumerate(made):
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{index}", "netns", switch)
            _ip("-n", switch, "link", "set", f"p{index}", "master", "br0", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            with suppress(subprocess.SubprocessError):
                host.kill()
        for name in (*(host.name for host in made), switch):
            with suppress(subprocess.SubprocessError):
                _ip("netns", "del", name)
