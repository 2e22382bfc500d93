"""What a command listens on, as the kernel knows it, and as docs/security.md says."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disaggregation.servers import ROUTE, SERVE, Started, ended, serve_arguments, start
from tests.server.running import ascii_folder

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
RANKS = 2
ADDRESSES = {"`--host`": "127.0.0.2", "`--transfer-host`": "127.0.0.3", "the loopback": "127.0.0.1"}
"""The first two are given to all commands but one, so that they can be told apart."""
WITHOUT_OPTIONS = "serve"
COMMANDS = ("serve", "serve --executor processes", "serve --role prefill", "serve --role decode", "route")
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
            (
                _,
                local,
                _,
                state,
                *_,
            ) = line.split()
            if state == _LISTENS and line.split()[9] in own:
                found[address(local.partition(":")[0])] += 1
    return found


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[dict[str, Started]]:
    """All commands, with a key and a token, as on a machine with other users."""
    token = tmp_path_factory.mktemp("secrets") / "token"
    token.write_text("a secret of some length")
    host, pair = ["--host", ADDRESSES["`--host`"]], ["--transfer-token-file", str(token)]
    transfer = ["--transfer-host", ADDRESSES["`--transfer-host`"], *pair]
    more = {
        WITHOUT_OPTIONS: [],
        "serve --executor processes": ["--executor", "processes", *host],
        "serve --role prefill": ["--role", "prefill", *host, *transfer],
        "serve --role decode": ["--role", "decode", *host, *transfer],
    }
    started = {
        name: start(SERVE, serve_arguments(ascii_folder(), "-pcp", str(RANKS), *arguments))
        for name, arguments in more.items()
    }
    with ended(*started.values()):
        sides = [f"--{role}={started[f'serve --role {role}'].url()}" for role in ("prefill", "decode")]
        started["route"] = start(ROUTE, [*sides, "--port", "0", *host, *pair])
        with ended(started["route"]):
            for one in started.values():
                one.url()
            yield started


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_listens_where_the_page_says_and_nowhere_else(running, command):
    addresses = {} if command == WITHOUT_OPTIONS else ADDRESSES
    expected = {addresses.get(where, "127.0.0.1"): number for where, number in promised(command).items()}
    assert expected
    assert listens(running[command].process.pid) == expected


def test_the_page_names_every_command_that_is_tried():
    rows = re.findall(r"^\| `(.+?)` \| .+? \| .+? \| 1.* \|$", PAGE.read_text(), re.MULTILINE)
    assert set(rows) == set(COMMANDS)
