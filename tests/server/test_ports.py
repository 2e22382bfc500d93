"""What a server listens on, as the kernel knows it, and as docs/security.md says."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.disaggregation.servers import SERVE, Started, ended, serve_arguments, start
from tests.listening import ADDRESSES, PAGE, RANKS, listens, promised_addresses
from tests.server.running import ascii_folder

WITHOUT_OPTIONS, PROCESSES = "serve", "serve --executor processes"
TRIED_WITH_A_ROUTER = ("serve --role prefill", "serve --role decode", "route")
"""These are asked in tests/disaggregation/test_route.py, whose servers are such."""


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, Started]]:
    """Both commands."""
    options = {WITHOUT_OPTIONS: [], PROCESSES: ["--executor", "processes", "--host", ADDRESSES["`--host`"]]}
    started = {
        name: start(SERVE, serve_arguments(ascii_folder(), "-pcp", str(RANKS), *arguments))
        for name, arguments in options.items()
    }
    with ended(*started.values()):
        for one in started.values():
            one.url()
        yield started


@pytest.mark.parametrize(("command", "addresses"), [(WITHOUT_OPTIONS, {}), (PROCESSES, ADDRESSES)])
def test_a_server_listens_where_the_page_says_and_nowhere_else(running, command, addresses):
    assert listens(running[command].process.pid) == promised_addresses(command, addresses)


def test_the_page_names_every_command_that_is_tried():
    rows = re.findall(r"^\| `(.+?)` \| .+? \| .+? \| 1.* \|$", PAGE.read_text(), re.MULTILINE)
    assert set(rows) == {WITHOUT_OPTIONS, PROCESSES, *TRIED_WITH_A_ROUTER}
