"""Several hosts on one machine: network namespaces with an address each, behind a bridge of their own.

They share files and process ids and nothing of the network, not even with this machine's own.
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
    """A host: what is run on it has its address, and what is killed with it is gone."""

    name: str
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start a program there, which goes on until it ends or the host is killed."""
        there = ["ip", "netns", "exec", self.name, *command]
        with log.open("ab") as output:
            self.processes.append(
                subprocess.Popen(
                    there, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}
                )
            )

    def threads(self, number: int) -> ThreadPoolExecutor:
        """Threads of this process that are on the host, as far as the network goes."""
        return ThreadPoolExecutor(number, initializer=_enter, initargs=(self.name,))

    @property
    def process_ids(self) -> list[int]:
        """Of everything that runs there."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """End everything that runs there, at once."""
        deadline = time.monotonic() + 10
        while (pids := self.process_ids) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                process.poll()
        for process in self.processes:
            process.wait(10)

    def cut_off(self) -> None:
        """Pull the network cable: nothing ends, and nobody is told."""
        _ip("-n", self.name, "link", "set", "eth0", "down")


def _enter(name: str) -> None:
    with Path(f"/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10).stdout


@cache
def why_not() -> str | None:
    """Why there can be no hosts here."""
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
    """So many hosts, which reach each other and nothing else; all that runs on them ends with them."""
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
