"""What a process listens on, as the kernel knows it, and what docs/security.md says of each command."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
RANKS = 2
ADDRESSES = {"`--host`": "127.0.0.2", "`--transfer-host`": "127.0.0.3", "the loopback": "127.0.0.1"}
"""The first two are given as options, so that they can be told apart."""
_LISTENS = "0A"


def promised(command: str) -> Counter[str]:
    """How many sockets at which address, in the page's words."""
    rows = re.findall(r"^\| `(.+?)` \| .+? \| (.+?) \| (1|1 a rank) \|$", PAGE.read_text(), re.MULTILINE)
    found: Counter[str] = Counter()
    for name, where, number in rows:
        if name == command:
            found[where] += 1 if number == "1" else RANKS
    return found


def family(process: int) -> set[int]:
    """The process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def sockets(process: int) -> Iterator[str]:
    """Inodes of its open sockets."""
    for file in Path(f"/proc/{process}/fd").iterdir():
        try:
            target = str(file.readlink())
        except OSError:  # closed meanwhile
            continue
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            yield match[1]


def address(text: str) -> str:
    """Of /proc/net/tcp: words of four bytes in the machine's order."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    kind = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(kind, b"".join(words))


def listens(process: int) -> Counter[str]:
    """How many TCP sockets the process and those below it listen on, by address."""
    own = {inode for member in family(process) for inode in sockets(member)}
    found: Counter[str] = Counter()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTENS and rest[5] in own:
                found[address(local.partition(":")[0])] += 1
    return found


def promised_addresses(command: str, addresses: dict[str, str]) -> dict[str, int]:
    """How many sockets at which address, for a command that was given `addresses` or is at its defaults."""
    found = {addresses.get(where, "127.0.0.1"): number for where, number in promised(command).items()}
    assert found, f"the page says nothing of `{command}`"
    return found
